"""Replay (Chaudhry et al., 2019): a few examples of each earlier task come along."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import Task
from torch.utils.data import Dataset

from .sequential import ScopeSettings, Sequential


@dataclass(frozen=True)
class ReplaySettings(ScopeSettings):
    replay: float = field(default=0.02, metadata={"help": "Part of each earlier task that Replay stores."})


class Replay(Sequential):
    """A part of each task's examples is stored, and joins the training on every later task."""

    title = "Replay"
    Settings = ReplaySettings

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.stored: list[tuple[str, str]] = []

    def training_rows(self, task: Task) -> list[tuple[str, str]]:
        return task.train + self.stored

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        count = math.ceil(self.settings.replay * len(task.train))
        self.stored += random.Random(f"{self.settings.seed} {task.name}").sample(task.train, count)

    def load_state(self, tensors: dict[str, torch.Tensor], learned: Sequence[Task]) -> None:
        super().load_state(tensors, learned)
        for task in learned:
            self.end_task(task, [])
