"""The base model of a chain: which class, which name, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ..chain.errors import ChainError
from ..chain.reading import AdapterFile

_CLASSES: dict[str | None, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def model_class(adapters: Sequence[AdapterFile]) -> Any:
    """The Auto class that the newest adapter's task type asks for; without one the class that it was trained in."""
    config = adapters[-1].config
    kind = getattr(config.task_type, "value", config.task_type)
    return _CLASSES.get(kind) or _trained_in(config.auto_mapping) or AutoModel


def _trained_in(mapping: Any) -> Any:
    """The class that PEFT has written into the config, if transformers has it: nothing else is imported for a file."""
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def without_weights(adapters: Sequence[AdapterFile], name: str) -> Any:
    """The base model on the meta device; only its config is read."""
    chosen, config = model_class(adapters), AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return chosen(config) if issubclass(chosen, PreTrainedModel) else chosen.from_config(config)


def load_base(adapters: Sequence[AdapterFile], name: str | None) -> tuple[Any, str]:
    """The base model, and its name: `name`, or the one in the adapters' configs.

    Raises:
        ChainError: none is named.
    """
    named = (adapter.config.base_model_name_or_path for adapter in adapters)
    chosen = name or next(filter(None, named), None)
    if chosen is None:
        raise ChainError("The chain does not name its base model. Give one with --base.")
    return model_class(adapters).from_pretrained(chosen, dtype="auto"), chosen
