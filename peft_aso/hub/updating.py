"""Exchange one task of a chain for a newer version of itself."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ..chain.errors import ChainError
from ..chain.fitting import BaseView, check_fit
from ..chain.removing import adapter_for, note_replaced
from ..tuner.persistence import ATTRIBUTION_KEY
from .fetching import Access, Source, fetch

# settings that say how the adapter is added up, or where
_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias")


def update_task(
    model: Any,
    task: str,
    source: Source,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> None:
    """Load another version of a task into its adapter, wherever it stands in the chain.

    Tasks learned after it were trained with its old weights in the forward pass: test them. `save_chain` and
    `push_chain` write the new version, and its hash for the tasks that have it in their history.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        task: which one.
        source: a chain's folder or repository with that task.
        revision, token, cache_dir, local_files_only: as `load_chain`.

    Raises:
        ChainError: before the model is touched: no such task in the model or there, files that cannot be read, or
            an adapter of another rank, alpha or other modules.
    """
    name = adapter_for(model, task)
    found = fetch(source, Access(revision, token, cache_dir, local_files_only), [task], strict=True)
    new = next((adapter for adapter in found.adapters if adapter.name == task), None)
    if new is None:
        raise ChainError(f"There is no task {task!r} in {source}.")
    config = model.peft_config[name]
    known = {field.name for field in fields(LoraConfig)}
    other = [key for key in _SAME if key in known and getattr(new.config, key) != getattr(config, key)]
    if other:
        changes = ", ".join(f"{key} {getattr(new.config, key)!r}, not {getattr(config, key)!r}" for key in other)
        raise ChainError(
            f"{task!r} of {source} cannot take the old one's place: {changes}. remove_task, and train or load it anew."
        )
    weights = check_fit(new, new.weights(), BaseView.of(model.base_model.model))
    missing = set(get_peft_model_state_dict(model, adapter_name=name)) - set(weights) - {ATTRIBUTION_KEY}
    if missing:
        raise ChainError(
            f"{task!r} of {source} has no weights for {min(missing)}. remove_task, and train or load it anew."
        )
    note_replaced(model, task, name)
    model.base_model.attribution.pop(name, None)
    for key in ("similarities", "soft_coefficients", "origin", "attribution_layout"):
        setattr(config, key, getattr(new.config, key))
    set_peft_model_state_dict(model, dict(weights), adapter_name=name)
