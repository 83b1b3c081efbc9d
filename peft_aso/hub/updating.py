"""Exchange one task of a chain for a newer version of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ..chain.errors import ChainError, warn_or_raise
from ..chain.fitting import BaseView, check_fit
from ..chain.reading import AdapterFile
from ..chain.removing import adapter_for, hash_in, note_replaced, refuse_merged
from ..tuner.history import adapter_of, task_name_of
from ..tuner.persistence import ATTRIBUTION_KEY, check_attribution
from .fetching import Access, Source, fetch

# settings that say how the adapter is added up, or where
_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias")


def update_task(
    model: Any,
    task: str,
    source: Source,
    *,
    strict: bool = True,
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
        task: which one, by its own or its adapter's name.
        source: a chain's folder or repository with that task.
        strict: whether other weights of the history than those that the new version was trained on top of (by the
            source's manifest) are an error; else a warning.
        revision, token, cache_dir, local_files_only: as `load_chain`.

    Raises:
        ChainError: before the model is touched: no such task in the model or there, merged adapters, files that cannot
            be read, an adapter of another rank, alpha or other modules, or one that was trained on top of others.
    """
    name = adapter_for(model, task)
    refuse_merged(model)
    config = model.peft_config[name]
    task = task_name_of(name, config)
    found = fetch(source, Access(revision, token, cache_dir, local_files_only), [task], strict=True)
    new = next((adapter for adapter in found.adapters if adapter.name == task), None)
    if new is None:
        raise ChainError(f"There is no task {task!r} in {source}.")
    _check_settings(new, config, source)
    _check_history(model, new, config, found.manifest, source, strict)
    weights = _fitting_weights(model, name, new, source)
    note_replaced(model, task, name)
    model.base_model.attribution.pop(name, None)
    for key in ("similarities", "soft_coefficients", "origin", "attribution_layout"):
        setattr(config, key, getattr(new.config, key))
    model.base_model.forget_soft_coefficients(name)
    set_peft_model_state_dict(model, dict(weights), adapter_name=name)


def _check_settings(new: AdapterFile, config: Any, source: Source) -> None:
    """See that the new version is added up as the old one."""
    known = {field.name for field in fields(LoraConfig)}
    other = [key for key in _SAME if key in known and getattr(new.config, key) != getattr(config, key)]
    changes = [f"{key} {getattr(new.config, key)!r}, not {getattr(config, key)!r}" for key in other]
    if new.is_stock:
        changes = ["a stock LoRA adapter, which belongs to no chain"]
    if changes:
        raise ChainError(
            f"{new.name!r} of {source} cannot take the old one's place: {', '.join(changes)}. remove_task, and train "
            "or load it anew."
        )


def _check_history(
    model: Any, new: AdapterFile, config: Any, manifest: Mapping[str, Mapping[str, Any]], source: Source, strict: bool
) -> None:
    """See that the new version was trained on top of what it will run on."""
    if new.history != list(config.history or []):
        raise ChainError(
            f"{new.name!r} of {source} was trained on top of {new.history or 'nothing'}, and the history in the model "
            f"is {config.history or 'empty'}. Load that chain with load_chain, or train the task anew."
        )
    for old in new.history:
        holder, entry = adapter_of(old, model.peft_config), manifest.get(old)
        if holder is None or entry is None:
            continue
        digest = hash_in(model, holder)
        if digest != entry["sha256"]:
            warn_or_raise(
                f"{new.name!r} of {source} was trained on top of {old!r} with the sha256 {entry['sha256']}, and the "
                f"model's has {digest}. Update {old!r} first, or pass strict=False.",
                strict,
            )


def _fitting_weights(model: Any, name: str, new: AdapterFile, source: Source) -> dict[str, torch.Tensor]:
    """The new version's weights, of the same modules and shapes as those that they replace."""
    weights = check_fit(new, new.weights(), BaseView.of(model.base_model.model))
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = {key: tensor.shape for key, tensor in own.items() if key != ATTRIBUTION_KEY}
    found = {key: tensor.shape for key, tensor in weights.items() if key != ATTRIBUTION_KEY}
    other = [key for key in sorted({*shapes, *found}) if shapes.get(key) != found.get(key)]
    if other:
        here, there = (tuple(held.get(other[0], ())) or "none" for held in (shapes, found))
        raise ChainError(
            f"{new.name!r} of {source} has other modules: the shape of {other[0]} is {there} there and {here} in the "
            "model. remove_task, and train or load it anew."
        )
    if ATTRIBUTION_KEY in weights and new.config.attribution_layout:
        try:
            check_attribution(new.name, new.config.attribution_layout, weights[ATTRIBUTION_KEY])
        except ValueError as error:
            raise ChainError(str(error)) from error
    return weights
