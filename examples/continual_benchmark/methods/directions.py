"""A started from the directions that the task's own inputs have, out of the way of the history's.

An A that has hardly left a random start does not span what the inputs span, and to be orthogonal to it protects
little. Here the rows of A are the leading directions of each module's inputs (as in PEFT's EVA), and before they are
chosen, the history's rows can be taken out, all of them or as much as psi says: x - psi_t Q_t Q_t' x for each earlier
task t, Q_t an orthonormal basis of its A's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_aso import update_coefficients


def start_from_inputs(model: Any, batches: list[dict[str, Any]], projected: str) -> None:
    """Set the current task's A.

    Args:
        model: a PEFT model with the task's fresh adapter active.
        batches: of the task's data, with `attention_mask`.
        projected: "" (not), "hard" (out of the history's rows), or "soft" (as far as psi says before the first step).
    """
    tuner = model.base_model
    task, history = tuner.current_task, list(tuner.history)
    psi: dict[str, Any] = dict.fromkeys(history, 1.0 if projected == "hard" else 0.0)
    if projected == "soft" and history:
        psi = update_coefficients(model, batches[:1]).soft_coefficients
    moments = second_moments(model, task, batches)
    for name, module in layers_with(model, task).items():
        weight = module.lora_A[task].weight
        moment = moments[name]
        for old in history:
            if old in module.lora_A and psi[old]:
                moment = without(moment, module.lora_A[old].weight.detach().double(), _number(psi[old]))
        values = torch.linalg.eigh(moment).eigenvectors[:, -weight.shape[0] :]
        with torch.no_grad():
            weight.copy_(values.T.flip(0))


def layers_with(model: Any, task: str) -> dict[str, Any]:
    """The linear layers that have this adapter, by name."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and task in module.lora_A
    }


def without(moment: torch.Tensor, rows: torch.Tensor, psi: float) -> torch.Tensor:
    """The second moment of inputs x - psi Q Q' x, Q an orthonormal basis of `rows` `(r, d)`."""
    basis = torch.linalg.qr(rows.T).Q
    keep = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - psi * basis @ basis.T
    return keep @ moment @ keep


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


def _number(value: Any) -> float:
    return float(sum(value) / len(value)) if isinstance(value, list) else float(value)
