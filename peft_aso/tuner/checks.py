"""What may not become part of a chain of tasks, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .history import HistoryError
from .layer import UNSUPPORTED_LAYERS, matrices_of

# init_lora_weights values that change the base weights, which all tasks share
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# settings with which an adapter is not a sum W + (alpha/r) B A, or touches weights that all tasks share
_NOT_A_SUM = {
    "use_dora": "DoRA rescales the base weight, so that adapters cannot be summed (Eq. 3)",
    "target_parameters": "adapters on bare parameters are merged into them during the forward pass",
    "trainable_token_indices": "trained embedding rows replace the base model's and cannot be summed",
    "layer_replication": "it changes the layers of the base model, which all tasks share",
    "arrow_config": "it routes between adapters",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it acts on a part of the tokens only",
    "velora_config": "it changes how the adapter is computed",
    "monteclora_config": "it samples the adapter's weights",
    "kasa_config": "it truncates the base weight",
}


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse adapter names that PEFT would confuse with parts of the model's own parameter names.

    Raises:
        ValueError: the name is empty, has a dot, or equals a part of a module or parameter name.
    """
    parts = {"base_model", "base_layer", "weight", "bias", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    parts.update(part for key, _ in model.named_modules() if "lora_" not in key for part in key.split("."))
    if not name or "." in name or "/" in name or name in parts:
        raise ValueError(
            f"An adapter cannot be called {name!r}: the name is empty, has a dot or a slash, or is a part of the "
            "model's own parameter names, and PEFT finds an adapter's weights by its name. Choose another name, "
            f"such as {'task-' + name.replace('.', '-').replace('/', '-')!r}."
        )


def chain_obstacles(config: Any) -> Iterator[str]:
    """Reasons why an adapter with this config can be neither history nor built on a history."""
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        yield (
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which all tasks share (train it "
            "with another initialisation, or convert it with save_pretrained("
            "path_initial_model_for_weight_conversion=...))"
        )
    if config.bias != "none":
        yield f"bias={config.bias!r} trains the base model's biases, which all tasks share"
    for name, reason in _NOT_A_SUM.items():
        if getattr(config, name, None):
            yield f"{name}: {reason}"


def check_chain(adapter: str, history: tuple[str, ...], configs: Mapping[str, Any]) -> None:
    """Refuse a chain in which one adapter cannot be summed with the others.

    Raises:
        HistoryError: says which adapter and which of its settings.
    """
    if not history:
        return
    for name in (*history, adapter):
        for reason in chain_obstacles(configs[name]):
            raise HistoryError(
                f"The adapter {name!r} cannot be part of a chain of tasks: {reason}. Use it alone (history=[]), or "
                "leave the setting out."
            )


def check_layers(layers: Mapping[str, LoraLayer], adapter: str, history: tuple[str, ...]) -> None:
    """Refuse layer types whose output is not the base layer's plus the adapter's."""
    for name, layer in layers.items():
        if history and isinstance(layer, UNSUPPORTED_LAYERS) and adapter in layer.lora_A:
            raise HistoryError(
                f"{name} is a {type(layer).__name__}, which cannot carry a history. Leave it out of target_modules, "
                f"or add {adapter!r} with history=[]."
            )


def check_weights(state_dict: Mapping[str, Any], model: nn.Module, adapter: str) -> None:
    """Check weights that are about to be loaded: finite, and of the shapes that the model has.

    Args:
        state_dict: with the model's own keys (the adapter's name in them).

    Raises:
        ValueError: names the tensor and what is wrong with it.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(
                f"The weights of adapter {adapter!r} hold NaN or Inf ({key}). The file is damaged or the training "
                "diverged; nothing was loaded. Use an earlier checkpoint."
            )
        if key in shapes and shapes[key] != value.shape:
            raise ValueError(
                f"The adapter {adapter!r} does not fit this model: {key} has shape {tuple(value.shape)} in the file "
                f"and {tuple(shapes[key])} here. It was made for another base model, or its adapter_config.json does "
                "not belong to its weights."
            )


def untrained(layers: Mapping[str, LoraLayer], adapter: str) -> bool:
    """True if all of the adapter's B matrices are zero: it adds nothing yet."""
    matrices = [
        matrices_of(layer, adapter)[1]
        for layer in layers.values()
        if adapter in layer.lora_B or adapter in layer.lora_embedding_B
    ]
    return all(not matrix.any() for matrix in matrices)
