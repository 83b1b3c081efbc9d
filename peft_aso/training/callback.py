"""When the coefficients are computed during a run: `ASOCallback`."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner import ASOLoraModel
from .attribution import check_readable, try_attribution
from .coefficients import Coefficients, agree, require_tuner, store_attribution, update_coefficients
from .probe import NoAnswersError, choose_probe, seed_of


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
        require_tuner(model).note_sharding()
        self._probe = self._readable_probe(args, model, loader)
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
        task = require_tuner(kwargs["model"]).current_task
        try:
            if self._probe:
                store_attribution(kwargs["model"], self._probe, progress=not args.disable_tqdm)
        except Exception as error:  # the task is learned: a script that goes on to save it must not die of this
            _say_not_stored(args, task, error)
        self._probe = []

    def _readable_probe(self, args: TrainingArguments, model: nn.Module, loader: Any) -> list[dict[str, Any]]:
        """The probe, on which attribution was tried; empty where none is wanted, or where it cannot read the task and
        nothing needs it yet.

        Raises:
            ValueError: attribution cannot read the task, and this task's psi or a later one's needs it.
        """
        tuner = require_tuner(model)
        task = tuner.current_task
        settings = tuner.peft_config[task].attribution
        if settings.similarity == "none":
            return []
        try:
            probe = choose_probe(loader, settings.probe_size, seed_of(args))
            check_readable(model, probe, settings)
            try_attribution(model, probe[0], settings)
        except NoAnswersError:
            raise
        except Exception as error:  # whatever a model raises when its neurons are looked at
            if _weighs(tuner) or settings.source == "stored":
                raise ValueError(_needed(task, error)) from error
            _say_not_stored(args, task, error)
            return []
        return probe

    def _refresh(self, args: TrainingArguments, model: nn.Module) -> None:
        tuner = require_tuner(model)
        if not _weighs(tuner):
            return
        self.last = update_coefficients(model, self._probe, progress=not args.disable_tqdm)
        if args.world_size > 1:
            agree(tuner)


def _weighs(tuner: ASOLoraModel) -> bool:
    """Whether the current task has a penalty for psi to weigh."""
    return bool(tuner.history) and tuner.peft_config[tuner.current_task].resolved_penalty_weight > 0


def _needed(task: str, reason: Exception) -> str:
    return (
        f"{task!r} needs attribution, for psi or for the vector that it stores, and attribution cannot read the task: "
        f"{str(reason).rstrip('.')}. AttributionConfig(similarity='none') trains without it (psi = 1, hard "
        "orthogonality), penalty_weight=0 without a penalty."
    )


def _say_not_stored(args: TrainingArguments, task: str, reason: Exception) -> None:
    if args.process_index == 0:
        warnings.warn(_not_stored(task, reason), stacklevel=3)


def _not_stored(task: str, reason: Exception) -> str:
    return (
        f"No attribution vector is stored with {task!r}, because attribution cannot read the task: "
        f"{str(reason).rstrip('.')}. The training is the same without it: only a later task with "
        "AttributionConfig(source='stored') needs the vector. "
        f"Settings that may help, in model.peft_config[{task!r}].attribution before the training: max_answer_tokens "
        "(longer answers), neurons (mixtures of experts); similarity='none' leaves attribution off, without a warning."
    )


def steps_between(refresh: float, max_steps: int) -> int:
    """Optimizer steps from one refresh to the next; 0 for never again."""
    if refresh == 0:
        return 0
    return int(refresh) if refresh >= 1 else max(1, math.ceil(refresh * max_steps))
