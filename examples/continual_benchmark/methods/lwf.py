"""Learning without forgetting (Li and Hoiem, 2017): the model before the task teaches on the task's own inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tasks import Task

from .base import Inputs
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

    def training_loss(self, inputs: Inputs, outputs: Any) -> torch.Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            taught = self.teacher(**inputs).logits
        labels = inputs["labels"] if self.seq2seq else inputs["labels"][:, 1:]
        places = labels != -100
        ours, theirs = (each if self.seq2seq else each[:, :-1] for each in (outputs.logits, taught))
        heat = self.settings.lwf_temperature
        distance = torch.nn.functional.kl_div(
            torch.log_softmax(ours[places].float() / heat, -1),
            torch.log_softmax(theirs[places].float() / heat, -1),
            log_target=True,
            reduction="batchmean",
        )
        return self.settings.lwf_weight * heat * heat * distance
