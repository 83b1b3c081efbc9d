"""Replay (Chaudhry et al., 2019): a few examples of each earlier task come along."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from tasks import Task
from torch.utils.data import Dataset

from .sequential import Sequential


class Replay(Sequential):
    """A part of each task's examples is kept, and joins the training on every later task."""

    title = "Replay"

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.kept: list[tuple[str, str]] = []

    def training_rows(self, task: Task) -> list[tuple[str, str]]:
        return task.train + self.kept

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        self.kept += self.chosen(task)

    def chosen(self, task: Task) -> list[tuple[str, str]]:
        """The examples that are kept of a task: the same ones whenever it is asked."""
        count = math.ceil(self.settings.replay * len(task.train))
        return random.Random(f"{self.settings.seed} {task.name}").sample(task.train, count)

    def remember(self, memory: dict[str, torch.Tensor], learned: Sequence[Task]) -> None:
        self.kept = [row for task in learned for row in self.chosen(task)]
