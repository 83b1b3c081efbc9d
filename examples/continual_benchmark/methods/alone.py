"""A model a task, which forgets nothing and has to be told the task: the bound."""

from __future__ import annotations

import copy
from typing import Any

from peft import get_peft_model
from tasks import Task

from .base import Method


class PerTaskLoRA(Method):
    """Each task has its own adapter on the base model."""

    title = "PerTaskLoRA"
    alone = True

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.base = model

    def start_task(self, task: Task, index: int) -> None:
        if self.model is not self.base:
            self.base = self.model.unload()
        self.model = get_peft_model(self.base, self.lora())


class PerTaskFT(Method):
    """Each task has all weights to itself."""

    title = "PerTaskFT"
    alone = True

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.untouched = copy.deepcopy(model.state_dict())

    @classmethod
    def trains_all(cls, settings: Any) -> bool:
        return True

    def start_task(self, task: Task, index: int) -> None:
        self.model.load_state_dict(self.untouched)
