"""The base model of a chain: which class, which name, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
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
    """The Auto class that the newest adapter's task type asks for."""
    kind = adapters[-1].config.task_type
    return _CLASSES.get(getattr(kind, "value", kind), AutoModel)


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
