"""Learning without forgetting (Li and Hoiem, 2017): the model before the task teaches on the task's own inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import Task

from .sequential import ScopeSettings, Sequential


@dataclass(frozen=True)
class LwFSettings(ScopeSettings):
    lwf_weight: float = field(default=1.0, metadata={"help": "Weight of LwF's distillation."})
    lwf_temperature: float = field(default=2.0, metadata={"help": "Temperature of LwF's distillation."})


class LwF(Sequential):
    """The distribution over the answer's tokens is held near that of the model before the task."""

    title = "LwF"
    Settings = LwFSettings

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.teacher: Any = None

    def start_task(self, task: Task, index: int) -> None:
        if index == 0:
            return
        # weights that are not trained are shared, not copied
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        self.teacher = copy.deepcopy(self.model, memo=shared).eval().requires_grad_(False)

    def training_loss(self, inputs: dict[str, Any], outputs: Any) -> torch.Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            given = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            taught = self.teacher(**given).logits
        heat, labels = self.settings.lwf_temperature, inputs["labels"]
        ours, theirs = (torch.log_softmax(self.answers(each, labels) / heat, -1) for each in (outputs.logits, taught))
        distance = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return self.settings.lwf_weight * heat * heat * distance
