"""PEFT's OSF: a task moves weights only along singular directions that earlier ones left free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import OSFConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import Task
from torch.utils.data import Dataset

from .base import Method


class OSF(Method):
    """After each task the weights are decomposed anew, and more of the directions are kept.

    PEFT projects the gradients; Adam, which is in all methods here, then takes a step that lies partly along kept
    directions.
    """

    title = "OSF"

    @property
    def learning_rate(self) -> float:
        return self.settings.lr_full  # singular values and vectors of whole matrices are trained

    def start_task(self, task: Task, index: int) -> None:
        config = OSFConfig(effective_rank=self.kept(index), target_modules=self.targets())
        self.model = get_peft_model(self.model, config)

    def kept(self, index: int) -> float:
        """The part of the directions that task number `index` may not touch: a half, then ever more."""
        free = 1 - self.settings.osf_rank
        return 1 - free / (index + 1)

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        self.model = self.model.merge_and_unload()

    def save(self, folder: Path) -> None:
        save_file(
            {name: p.detach().contiguous() for name, p in self.model.named_parameters()}, folder / "model.safetensors"
        )

    def restore(self, folder: Path, learned: Sequence[Task]) -> None:
        tensors = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[name])
