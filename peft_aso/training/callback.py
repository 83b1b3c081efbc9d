"""When the coefficients are computed during a run: `ASOCallback`."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .coefficients import Coefficients, agree, require_tuner, store_attribution, update_coefficients
from .probe import choose_probe, seed_of


class ASOCallback(TrainerCallback):
    """Refreshes w and psi before the first step and as the run goes on; stores the task's vector at its end.

    Attributes:
        last (`Coefficients`): what the last refresh found.
        restored (`bool`): psi came from a checkpoint; the first refresh is the next one that is due.
    """

    def __init__(self) -> None:
        self.last: Coefficients | None = None
        self.restored = False
        self._probe: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        tuner = require_tuner(model)
        tuner.note_sharding()
        settings = tuner.peft_config[tuner.current_task].attribution
        if settings.similarity != "none":
            self._probe = choose_probe(loader, settings.probe_size, seed_of(args))
        if not self.restored:
            self._refresh(args, model)
        self.restored = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        tuner = require_tuner(model)
        every = steps_between(tuner.peft_config[tuner.current_task].attribution.refresh, state.max_steps)
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self._refresh(args, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probe:
            store_attribution(kwargs["model"], self._probe, progress=not args.disable_tqdm)
        self._probe = []

    def _refresh(self, args: TrainingArguments, model: nn.Module) -> None:
        tuner = require_tuner(model)
        config = tuner.peft_config[tuner.current_task]
        if not tuner.history or config.resolved_penalty_weight == 0:
            return  # psi would weigh nothing
        self.last = update_coefficients(model, self._probe, progress=not args.disable_tqdm)
        if args.world_size > 1:
            agree(tuner)


def steps_between(refresh: float, max_steps: int) -> int:
    """Optimizer steps from one refresh to the next; 0 for never again."""
    if refresh == 0:
        return 0
    return int(refresh) if refresh >= 1 else max(1, math.ceil(refresh * max_steps))
