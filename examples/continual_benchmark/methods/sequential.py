"""The same weights, trained on one task after another: SeqLoRA and SeqFT, and what Replay, EWC and LwF build on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import get_peft_model

from .base import Method


@dataclass(frozen=True)
class ScopeSettings:
    """Of methods that can train either."""

    scope: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "Train one LoRA adapter, or all weights."}
    )


class Sequential(Method):
    """One set of weights throughout: an adapter or all, by the run's scope."""

    Settings: type = ScopeSettings

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        if not self.trains_all(settings):
            self.model = get_peft_model(model, self.lora())

    @classmethod
    def trains_all(cls, settings: Any) -> bool:
        return bool(settings.scope == "full")


class SeqLoRA(Method):
    """One adapter throughout."""

    title = "SeqLoRA"

    def __init__(self, model: Any, tokenizer: Any, settings: Any) -> None:
        super().__init__(model, tokenizer, settings)
        self.model = get_peft_model(model, self.lora())


class SeqFT(Method):
    """All weights."""

    title = "SeqFT"

    @classmethod
    def trains_all(cls, settings: Any) -> bool:
        return True
