"""The directions that a layer's inputs have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def layers_with(model: Any, task: str) -> dict[str, Any]:
    """The linear layers that have this adapter, by name."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and task in module.lora_A
    }


def second_moments(model: Any, task: str, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Sum of x x' over the inputs of each layer, padding left out, float64 `(d, d)`."""
    found: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def add(name: str, inputs: torch.Tensor) -> None:
        states = inputs.detach()
        real = states.reshape(-1, states.shape[-1])
        if states.shape[:2] == mask.shape:
            real = states[mask.bool()]
        real = real.double()
        found[name] = found.get(name, 0) + real.T @ real

    with _watched(model, task, add), torch.no_grad():
        training = model.training
        model.eval()
        for batch in batches:
            mask = batch["attention_mask"]
            model(**batch)
        model.train(training)
    return found


@contextmanager
def _watched(model: Any, task: str, add: Any) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, module in layers_with(model, task).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
