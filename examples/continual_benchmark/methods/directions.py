"""The directions that a layer's inputs have."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch


def layers_with(model: Any, task: str) -> dict[str, Any]:
    """The linear layers that have this adapter, by name."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and task in module.lora_A
    }


def second_moments(model: Any, task: str, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Sum of x x' over the inputs of each layer of a model in eval mode, padding left out, float64 `(d, d)`."""
    found: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def add(name: str, inputs: torch.Tensor) -> None:
        real = inputs[mask.bool()] if inputs.shape[:2] == mask.shape else inputs.reshape(-1, inputs.shape[-1])
        real = real.double()
        found[name] = found.get(name, 0) + real.T @ real

    with ExitStack() as watched, torch.no_grad():
        for name, module in layers_with(model, task).items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            watched.callback(hook.remove)
        for batch in batches:
            mask = batch["attention_mask"]
            model(**batch)
    return found
