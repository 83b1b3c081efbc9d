"""When the coefficients are computed during a run (`ASOCallback`), and on which examples (`choose_probe`)."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .coefficients import attribution_of, require_tuner, update_coefficients
from .inputs import INPUT_EXAMPLES, update_input_memory

# examples in a batch of the probe; attribution splits it further by memory
BATCH = 16


class UnusableDataError(ValueError):
    """The training data have no answers, or cannot be put into batches: there is nothing to attribute, and no loss."""


class ASOCallback(TrainerCallback):
    """Updates w and psi before the first step and as the run goes on; stores the task's vector, and its input
    directions where the config asks for them, at its end.

    Attributes:
        restored (`bool`): psi came from a checkpoint; the first update is the next one that is due.
    """

    def __init__(self) -> None:
        self.restored = False
        self._probe: list[dict[str, Any]] = []
        self._inputs: list[dict[str, Any]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._probe = self._readable_probe(args, kwargs["model"], kwargs["train_dataloader"])
        tuner = require_tuner(kwargs["model"])
        # chosen now, so that data without answers are an error before the first step
        if tuner.peft_config[tuner.current_task].resolved_input_directions:
            self._inputs = choose_probe(kwargs["train_dataloader"], INPUT_EXAMPLES, probe_seed(args))
        if not self.restored:
            self._update(args, kwargs["model"])
        self.restored = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        tuner = require_tuner(kwargs["model"])
        refresh = tuner.peft_config[tuner.current_task].attribution.refresh
        steps = isinstance(refresh, int) or refresh > 1  # 1.0 is the complete run
        every = int(refresh) if steps else math.ceil(refresh * state.max_steps)
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self._update(args, kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        tuner = require_tuner(kwargs["model"])
        task = tuner.current_task
        config = tuner.peft_config[task]
        try:
            if self._probe:  # its mean vector is saved with the adapter
                progress = not args.disable_tqdm
                vector = attribution_of(kwargs["model"], task, self._probe, config.attribution, progress=progress)
                tuner.attribution[task] = vector.mean_vector().cpu()
                config.attribution_layout = [list(entry) for entry in vector.layout]
        except Exception as error:  # the task is learned: a script that goes on to save it must not end here
            _warn_not_stored(args, task, error)
        if self._inputs:
            update_input_memory(kwargs["model"], self._inputs, progress=not args.disable_tqdm)
        self._probe, self._inputs = [], []

    def _readable_probe(self, args: TrainingArguments, model: nn.Module, loader: Any) -> list[dict[str, Any]]:
        """The probe, after attribution with one step of the path; empty where no attribution is wanted, or where it
        cannot read the task and nothing needs it yet.

        Raises:
            ValueError: attribution cannot read the task, and psi of this task or of a later one needs it.
        """
        tuner = require_tuner(model)
        task = tuner.current_task
        settings = tuner.peft_config[task].attribution
        if settings.similarity == "none":
            return []
        try:
            probe = choose_probe(loader, settings.probe_size, probe_seed(args))
            attribution_of(model, task, probe, replace(settings, steps=1, quadrature="riemann"))
        except UnusableDataError:
            raise
        except Exception as error:  # models raise all kinds of errors here
            if tuner.uses_coefficients(task) or settings.source == "stored":
                raise ValueError(
                    f"{task!r} needs attribution, for psi or for the vector that it stores, and attribution cannot "
                    f"read the task: {str(error).rstrip('.')}. AttributionConfig(similarity='none') trains without it "
                    "(psi = 1, hard orthogonality), penalty_weight=0 without a penalty."
                ) from error
            _warn_not_stored(args, task, error)
            return []
        return probe

    def _update(self, args: TrainingArguments, model: nn.Module) -> None:
        tuner = require_tuner(model)
        if not tuner.uses_coefficients(tuner.current_task):
            return
        update_coefficients(model, self._probe, progress=not args.disable_tqdm)
        if args.world_size > 1:  # all take the first process's psi and w: theirs may differ in the last digits
            found = [tuner.soft_coefficients, tuner.peft_config[tuner.current_task].similarities]
            psi, similarities = broadcast_object_list(found)
            tuner.set_soft_coefficients(psi, similarities=similarities)


def _warn_not_stored(args: TrainingArguments, task: str, reason: Exception) -> None:
    if args.process_index == 0:
        warnings.warn(
            f"No attribution vector is stored with {task!r}, because attribution cannot read the task: "
            f"{str(reason).rstrip('.')}. A later task with AttributionConfig(source='stored') needs it. Settings that "
            "may help: max_answer_tokens (longer answers), neurons (mixtures of experts), similarity='none'.",
            stacklevel=3,
        )


# ---- the probe ---------------------------------------------------------------------------------------------


def probe_seed(args: TrainingArguments) -> int:
    """The seed of the order of the data in a Trainer with these settings."""
    return args.seed if args.data_seed is None else args.data_seed


def choose_probe(loader: DataLoader[Any], size: int, seed: int) -> list[dict[str, Any]]:
    """A few fixed examples of the training data, the same for the same seed, collated in small batches.

    Examples without answer tokens (all labels -100) are passed over. A collator that draws the answer tokens at random
    (masked language modelling) may leave a row without one: the row is left out, and others are taken. The random
    state is left as it was.

    Args:
        loader: the training dataloader: its dataset and its collator are used, not its order.
        size: how many examples; fewer if the dataset is smaller.
        seed: of the choice.

    Raises:
        UnusableDataError: no example has answer tokens, or the collator does not pad examples of different lengths.
        ValueError: the batches have no labels.
    """
    with _seeded(seed):
        candidates = islice(_examples(loader.dataset, seed), 4 * size + 64)
        answering = (each for each in candidates if _answered(loader.collate_fn([each])).any())
        batches: list[dict[str, Any]] = []
        missing = size
        while missing and (group := list(islice(answering, min(BATCH, missing)))):
            try:
                batch = dict(loader.collate_fn(group))
            except (RuntimeError, ValueError) as error:  # each of them alone made a batch
                raise UnusableDataError(
                    f"The collator cannot put examples into one batch: {str(error).rstrip('.')}. If they differ in "
                    "length, pass a collator that pads, such as data_collator=DataCollatorForSeq2Seq(tokenizer)."
                ) from error
            answered = _answered(batch)
            missing -= len(group) - int((~answered).sum())  # a collator may pack several examples in a row
            if not answered.all():  # only tensors with a row for each example are cut
                cut = {k: v for k, v in batch.items() if torch.is_tensor(v) and v.dim() and len(v) == len(answered)}
                batch |= {name: value[answered] for name, value in cut.items()}
            if answered.any():
                batches.append(batch)
        if not batches:
            raise UnusableDataError(
                "No example of the training data has answer tokens: all labels are -100. The attribution (and the "
                "loss) need labels on the answer; check the tokenization, truncation and chat template."
            )
        return batches


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside the context collators draw the same random numbers for the same seed; the caller's are not used up."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _examples(dataset: Any, seed: int) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        for example in dataset:  # noqa: UP028 - `yield from` would close a generator that is used again later
            yield example
        return
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    for index in order.tolist():
        yield dataset[index]


def _answered(batch: Mapping[str, Any]) -> torch.Tensor:
    """bool `(batch,)`: the rows with a label that is not -100."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"The training batches have no `labels` (they have: {', '.join(sorted(batch))}). The attribution needs "
            "them: use a collator that adds them, or a dataset with a `labels` column."
        )
    labels = torch.as_tensor(labels)
    return (labels != -100).reshape(len(labels), -1).any(1)
