"""Take an adapter out of a model whose adding or loading failed, so that nothing half-made stays behind."""

from __future__ import annotations

import warnings

from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def remove_adapter(model: nn.Module, adapter_name: str, active: list[str]) -> None:
    """Remove the adapter from all layers, and layers that were wrapped for it alone.

    Args:
        model: the base model, with LoRA layers in it.
        active: the adapters that are active afterwards; one that is not in a layer is simply not used there.
    """
    active = [name for name in active if name != adapter_name]
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and adapter_name in module._all_available_adapter_names():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT would say which adapter it activates; that is undone here
                module.delete_adapter(adapter_name)
            module._active_adapter = list(active)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            module.delete_adapter(adapter_name, new_active_adapters=active)
    for name, module in list(model.named_modules()):
        original = _unused_wrapper(module)
        if original is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, original)


def _unused_wrapper(module: nn.Module) -> nn.Module | None:
    """What is inside a wrapper of PEFT's that no adapter uses any more."""
    if isinstance(module, LoraLayer) and not module._get_available_adapters():
        return module.base_layer
    if isinstance(module, AuxiliaryTrainingWrapper) and not module._get_available_adapters():
        return module.original_module
    return None
