"""What may not become part of a chain of tasks, and why; what may not be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .history import HistoryError, changes_base
from .layer import UNSUPPORTED_LAYERS, adapters_in


def check_base_unchanged(adapter: str, configs: Mapping[str, Any]) -> None:
    """Refuse an initialisation that changes the base weights under other adapters of the same model.

    Raises:
        HistoryError: says which adapter it is.
    """
    for name, config in configs.items():
        if changes_base(config) and len(configs) > 1:
            raise HistoryError(
                f"{adapter!r} cannot be added: init_lora_weights={config.init_lora_weights!r} of {name!r} "
                "changes the base weights, which all adapters of the model share. Keep such an adapter alone "
                "in its model, or train it with another initialisation."
            )


def check_layers(layers: Mapping[str, LoraLayer], adapter: str, history: tuple[str, ...]) -> None:
    """Refuse layer types whose output is not the base layer's plus the adapter's."""
    for name, layer in layers.items():
        if history and isinstance(layer, UNSUPPORTED_LAYERS) and adapters_in(layer, [*history, adapter]):
            raise HistoryError(
                f"{name} is a {type(layer).__name__}, which cannot carry a history. Leave it out of "
                f"target_modules, or add {adapter!r} with history=[]."
            )


def check_weights(state_dict: Mapping[str, Any], model: nn.Module, adapter: str, complete: bool = False) -> None:
    """Check weights that are about to be loaded: finite, of the shapes that the model has, for modules that
    it has.

    Args:
        state_dict: with the model's own keys (the adapter's name in them).
        complete: whether all weights of the adapter have to be there.

    Raises:
        ValueError: names the tensor and what is wrong with it.
    """
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and not is_finite(value):
            raise ValueError(
                f"The weights of adapter {adapter!r} hold NaN or Inf ({key}). The file is damaged or the "
                "training diverged; nothing was loaded. Use an earlier checkpoint."
            )
    check_tensors(state_dict, {key: value.shape for key, value in model.state_dict().items()}, adapter, complete)


def is_finite(tensor: torch.Tensor) -> bool:
    """True if a tensor of any shape and dtype holds neither NaN nor Inf."""
    if not tensor.is_floating_point():
        return True
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no arithmetic
    # NaN and Inf stay in every sum: one pass, without a copy. A sum of finite values can overflow; then look closely
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def check_tensors(
    state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size], adapter: str, complete: bool = False
) -> None:
    """Check the names and shapes of weights that are about to be loaded, as `check_weights` does.

    Args:
        state_dict: with the model's own keys (the adapter's name in them).
        shapes: model key -> shape; of the whole model, or of this adapter alone.
        complete: whether all weights of the adapter have to be there.

    Raises:
        ValueError: names the tensor and what is wrong with it.
    """
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        found = shapes.get(key)
        if (found is not None and found != value.shape) or (found is None and ".lora_" in key):
            here = "is not in it" if found is None else f"has shape {tuple(found)} in it"
            raise ValueError(
                f"The adapter {adapter!r} does not fit this model: {key}, of shape {tuple(value.shape)} in "
                f"the file, {here}. It was made for another base model, or its adapter_config.json does not "
                "belong to its weights."
            )
    own = [f".lora_{part}.{adapter}" for part in ("A", "B", "embedding_A", "embedding_B")]
    lacking = [key for part in own for key in shapes if part + "." in key or key.endswith(part)]
    lacking = [key for key in lacking if key not in state_dict]
    if complete and lacking:
        raise ValueError(
            f"The adapter {adapter!r} does not fit this model: its file has no weights for {len(lacking)} of "
            f"the model's parameters, such as {lacking[0]}. It was made for another base model, or its "
            "adapter_config.json does not belong to its weights."
        )
