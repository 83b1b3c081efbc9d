"""Elastic weight consolidation (Kirkpatrick et al., 2017), with the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tasks import Task
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..parts import Inputs, Part
from .sequential import Sequential


class EWC(Sequential):
    """Weights that mattered to earlier tasks are held where those tasks left them.

    The penalty is weight / 2 * sum over tasks t and weights i of F_ti (theta_i - theta_ti)^2. One sum each of F_t, of
    F_t theta_t and of F_t theta_t^2 holds all tasks.
    """

    title = "EWC"

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of F_t, and of F_t theta_t
        self.constant = torch.zeros((), device=self.device)  # of F_t theta_t^2

    def training_loss(self, inputs: Inputs, parts: list[Part]) -> torch.Tensor | None:
        if not self.sums:
            return None
        parts = []
        for name, weight in self.trained().items():
            fisher, anchored = self.sums[name]
            parts.append((fisher * weight * weight - 2 * anchored * weight).sum())
        return self.settings.ewc_weight / 2 * (torch.stack(parts).sum() + self.constant)

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        fisher = self.fisher(examples)
        for name, weight in self.trained().items():
            theta, own = weight.detach(), fisher[name]
            total, anchored = self.sums.get(name, (torch.zeros_like(theta), torch.zeros_like(theta)))
            self.sums[name] = (total + own, anchored + own * theta)
            self.constant += (own * theta * theta).sum()

    def fisher(self, examples: Dataset[Any]) -> dict[str, torch.Tensor]:
        """Mean over examples of the squared gradient of log P(answer given prompt), for each weight."""
        count = min(self.settings.ewc_examples, len(examples))  # type: ignore[arg-type]
        trained = self.trained()
        found = {name: torch.zeros_like(weight) for name, weight in trained.items()}
        self.model.eval()
        for index in tqdm(range(count), desc="Fisher information", unit="example", leave=False):
            example = examples[index]
            batch = {name: torch.tensor([values], device=self.device) for name, values in example.items()}
            answer = batch["labels"] if self.seq2seq else batch["labels"][:, 1:]
            tokens = int((answer != -100).sum())
            gradients = torch.autograd.grad(self.model(**batch).loss * tokens, list(trained.values()))
            for total, gradient in zip(found.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient, value=1 / count)
        self.model.train()
        return found

    def memory(self) -> dict[str, torch.Tensor]:
        found = {"constant": self.constant}
        for name, (fisher, anchored) in self.sums.items():
            found[f"fisher.{name}"], found[f"anchored.{name}"] = fisher, anchored
        return {name: value.cpu().contiguous() for name, value in found.items()}

    def remember(self, memory: dict[str, torch.Tensor], learned: Sequence[Task]) -> None:
        memory = {name: value.to(self.device) for name, value in memory.items()}
        self.constant = memory.pop("constant")
        names = [name.removeprefix("fisher.") for name in memory if name.startswith("fisher.")]
        self.sums = {name: (memory[f"fisher.{name}"], memory[f"anchored.{name}"]) for name in names}
