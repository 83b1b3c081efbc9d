"""PEFT's OSF: a task moves weights only along singular directions that earlier ones left free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import OSFConfig, get_peft_model
from tasks import Task
from torch.utils.data import Dataset

from .base import Method


@dataclass(frozen=True)
class OSFSettings:
    osf_rank: float = field(
        default=0.5,
        metadata={"help": "Part of the singular directions that OSF freezes for the first task; grows to 1."},
    )


class OSF(Method):
    """After each task the weights are decomposed anew, and more of the directions are frozen.

    PEFT projects the gradients; Adam, which is in all methods here, then takes a step that lies partly along frozen
    directions.
    """

    title = "OSF"
    Settings = OSFSettings

    @property
    def learning_rate(self) -> float:
        return self.settings.lr_full  # singular values and vectors of complete matrices are trained

    def start_task(self, task: Task, index: int) -> None:
        frozen = 1 - (1 - self.settings.osf_rank) / (index + 1)  # half of the directions, then ever more
        self.model = get_peft_model(self.model, OSFConfig(effective_rank=frozen, target_modules=self.targets()))

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        self.model = self.model.merge_and_unload()

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())  # merged after each task
