"""Learning without forgetting (Li and Hoiem, 2017): the model before the task teaches on the task's own inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tasks import Task

from ..parts import Inputs, Part, parts_of
from .sequential import Sequential


class LwF(Sequential):
    """The distribution over the answer's tokens is held near that of the model before the task."""

    title = "LwF"

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.teacher: Any = None

    def start_task(self, task: Task, index: int) -> None:
        if index == 0:
            return
        self.teacher = None  # not copied along
        # weights that are not trained are the same ones, not copies
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        self.teacher = copy.deepcopy(self.model, memo=shared).eval().requires_grad_(False)

    def training_loss(self, inputs: Inputs, parts: list[Part]) -> torch.Tensor | None:
        if self.teacher is None:
            return None
        heat, distances, tokens = self.settings.lwf_temperature, [], 0
        with torch.no_grad():
            taught = [self.teacher(**part).logits for part in parts_of(self.teacher, inputs, self.settings.part)]
        for part, said in zip(parts, taught, strict=True):
            ours, theirs = (
                torch.log_softmax(part.answers(each).float() / heat, -1) for each in (part.outputs.logits, said)
            )
            distances.append(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum"))
            tokens += len(ours)
        return self.settings.lwf_weight * heat * heat * torch.stack(distances).sum() / tokens
