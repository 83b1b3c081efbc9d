"""How hard the penalty pulls: the norm of its gradient at each step, beside the loss's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class PenaltyGradient(TrainerCallback):
    """Logs `penalty_gradient`, the norm of lambda times the penalty's gradient before each step.

    The Trainer's own `grad_norm` is that of loss and penalty together, before clipping.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradient."""
        model = kwargs["model"]
        tuner = model.base_model
        weight = model.peft_config[tuner.current_task].resolved_penalty_weight
        norm = 0.0
        if tuner.history and weight:
            trained = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
            gradients = torch.autograd.grad(weight * tuner.orthogonality_penalty(), trained, allow_unused=True)
            norm = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        self.norms.append(norm)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put it beside what the Trainer logs, where the log is kept."""
        if logs is not None and "loss" in logs and state.log_history:
            state.log_history[-1]["penalty_gradient"] = self.norms[-1]
