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
    batch: dict[str, torch.Tensor] = {}
    two_parts = model.config.is_encoder_decoder

    def add(name: str, inputs: torch.Tensor) -> None:
        answers = two_parts and _in_decoder(name)
        real = inputs[batch["labels"] != -100 if answers else batch["attention_mask"].bool()].double()
        found[name] = found.get(name, 0) + real.T @ real

    with ExitStack() as watched, torch.no_grad():
        for name, module in layers_with(model, task).items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            watched.callback(hook.remove)
        for batch in batches:
            model(**batch)
    return found


def _in_decoder(name: str) -> bool:
    """Whether a layer is given the decoder's states: keys and values of cross-attention are not."""
    parts = name.split(".")
    crosses = any("EncDecAttention" in part or "encoder_attn" in part for part in parts)
    return "decoder" in parts and not (crosses and parts[-1] in ("k", "v", "k_proj", "v_proj"))
