"""Elastic weight consolidation (Kirkpatrick et al., 2017), with the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import Task
from torch.utils.data import Dataset

from .sequential import ScopeSettings, Sequential


@dataclass(frozen=True)
class EWCSettings(ScopeSettings):
    ewc_weight: float = field(default=1000.0, metadata={"help": "Weight of EWC's penalty."})
    ewc_examples: int = field(default=100, metadata={"help": "Examples a task for EWC's Fisher information."})


class EWC(Sequential):
    """Weights that mattered to earlier tasks are held where those tasks left them.

    The penalty is weight / 2 * sum over tasks t and weights i of F_ti (theta_i - theta_ti)^2. One sum each of F_t, of
    F_t theta_t and of F_t theta_t^2 holds all tasks.
    """

    title = "EWC"
    Settings = EWCSettings

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.fisher: dict[str, torch.Tensor] = {}  # sum of F_t, by weight
        self.anchored: dict[str, torch.Tensor] = {}  # sum of F_t theta_t
        self.constant = torch.zeros((), device=self.device)  # sum of F_t theta_t^2

    def training_loss(self, inputs: dict[str, Any], outputs: Any) -> torch.Tensor | None:
        if not self.fisher:
            return None
        trained = self.trained().items()
        sums = [(self.fisher[name] * w * w - 2 * self.anchored[name] * w).sum() for name, w in trained]
        return self.settings.ewc_weight / 2 * (torch.stack(sums).sum() + self.constant)

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        """Add the task's Fisher information: the mean squared gradient of log P(answer given prompt)."""
        count, trained = min(self.settings.ewc_examples, len(examples)), self.trained()  # type: ignore[arg-type]
        fisher = {name: torch.zeros_like(weight) for name, weight in trained.items()}
        self.model.eval()
        for index in range(count):
            batch = {name: torch.tensor([row], device=self.device) for name, row in examples[index].items()}
            answer = batch["labels"] if self.seq2seq else batch["labels"][:, 1:]
            loss = self.model(**batch).loss * (answer != -100).sum()
            for total, gradient in zip(
                fisher.values(), torch.autograd.grad(loss, list(trained.values())), strict=True
            ):
                total.addcmul_(gradient, gradient, value=1 / count)
        self.model.train()
        for name, weight in trained.items():
            own, theta = fisher[name], weight.detach()
            self.fisher[name] = self.fisher.get(name, 0) + own
            self.anchored[name] = self.anchored.get(name, 0) + own * theta
            self.constant += (own * theta * theta).sum()

    def state(self) -> dict[str, torch.Tensor]:
        fisher = {f"fisher.{name}": value for name, value in self.fisher.items()}
        anchored = {f"anchored.{name}": value for name, value in self.anchored.items()}
        return {**super().state(), **fisher, **anchored, "constant": self.constant}

    def load_state(self, tensors: dict[str, torch.Tensor], learned: Sequence[Task]) -> None:
        super().load_state(tensors, learned)
        self.fisher = {name: tensors[f"fisher.{name}"].to(self.device) for name in self.trained()}
        self.anchored = {name: tensors[f"anchored.{name}"].to(self.device) for name in self.trained()}
        self.constant = tensors["constant"].to(self.device)
