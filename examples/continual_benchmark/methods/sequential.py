"""The same weights, trained on one task after another: SeqLoRA and SeqFT."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model

from .base import Method


class Sequential(Method):
    """One set of weights throughout: an adapter or all, by the run's scope."""

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        if self.scope_of(settings) == "lora":
            self.model = get_peft_model(model, self.lora())

    @classmethod
    def scope_of(cls, settings: Any) -> str:
        return str(settings.scope)


class SeqLoRA(Sequential):
    """One adapter throughout."""

    title = "SeqLoRA"

    @classmethod
    def scope_of(cls, settings: Any) -> str:
        return "lora"


class SeqFT(Sequential):
    """All weights."""

    title = "SeqFT"

    @classmethod
    def scope_of(cls, settings: Any) -> str:
        return "full"
