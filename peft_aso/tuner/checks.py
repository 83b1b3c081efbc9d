"""What may not become part of a chain of tasks, and why; what may not be loaded."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .history import HistoryError
from .layer import UNSUPPORTED_LAYERS, adapters_in

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

# parts of PEFT's own parameter names; "__base__" stands for the base model in mixed batches
_PEFT_PARTS = {
    "__base__", "base_model", "model", "base_layer", "weight", "bias", "lora_A", "lora_B", "lora_embedding_A",
    "lora_embedding_B", "lora_dropout", "lora_magnitude_vector", "modules_to_save", "original_module",
    "token_adapter",
}  # fmt: skip


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse adapter names that PEFT would confuse with parts of the model's own parameter names.

    Raises:
        ValueError: the name is empty, has a dot, or equals a part of a module or parameter name.
    """
    if not is_free(name, name_parts(model)):
        raise ValueError(
            f"An adapter cannot be called {name!r}: the name is empty, has a dot or a slash, or is a part of "
            "the model's own parameter names, and PEFT finds an adapter's weights by its name. Choose "
            f"another name, such as {'task-' + name.replace('.', '-').replace('/', '-')!r}."
        )


def check_new_task(name: str, model: nn.Module, adapters: Container[str]) -> None:
    """Refuse a task's name that a saved chain could not have, before anything is trained under it.

    Args:
        adapters: names of the model's adapters, which are parts of its parameter names and no obstacle.

    Raises:
        ValueError: the name is no plain folder name, or a part of the model's own parameter names.
    """
    if not is_folder_name(name) or (name not in adapters and not is_free(name, name_parts(model))):
        raise ValueError(
            f"A task cannot be called {name!r}: a chain keeps each task in a folder of its name, and loads it under "
            "that name. Choose a plain one that is no part of the model's own parameter names."
        )


def name_parts(model: nn.Module) -> set[str]:
    """The parts of the model's own names and of PEFT's, which no adapter may be called."""
    parts = set(_PEFT_PARTS)
    for keys in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        parts.update(part for key, _ in keys if "lora_" not in key for part in key.split("."))
    return parts


def is_free(name: str, parts: Container[str]) -> bool:
    """Whether an adapter may have this name in a model with these `name_parts`."""
    return bool(name) and "." not in name and "/" not in name and name not in parts


def is_folder_name(name: object) -> bool:
    """Whether a task's name can be the name of its folder: a text that leads neither out of one nor out of sight."""
    return isinstance(name, str) and name[:1] not in ("", ".") and not set(name) & set("/\\\0")


def changes_base(config: Any) -> bool:
    """True if adding an adapter with this config changes the weights of the base model."""
    return str(config.init_lora_weights).lower().startswith(_CHANGES_BASE)


def chain_obstacles(config: Any) -> Iterator[str]:
    """Reasons why an adapter with this config can be neither history nor built on a history."""
    if changes_base(config):
        yield (
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which all tasks share "
            "(train it with another initialisation, or convert it with save_pretrained("
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
                f"The adapter {name!r} cannot be part of a chain of tasks: {reason}. Use it alone "
                "(history=[]), or leave the setting out."
            )


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
