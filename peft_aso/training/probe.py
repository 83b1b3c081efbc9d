"""The probe: a few fixed examples of the current task's training data, on which attribution is computed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

# a batch of the probe; attribution splits it further by memory
BATCH = 8


class NoAnswersError(ValueError):
    """All labels of the training data are -100: neither attribution nor the loss has anything to go by."""


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Collators may draw random numbers: the same for the same seed, and the training must not notice."""
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


def seed_of(args: TrainingArguments) -> int:
    """What decides about the order of the data in a Trainer with these settings."""
    return args.seed if args.data_seed is None else args.data_seed


def choose_probe(loader: DataLoader[Any], size: int, seed: int) -> list[dict[str, Any]]:
    """`size` examples of the loader's dataset, the same for the same seed, collated in small batches.

    Examples without answer tokens (all labels -100) are passed over. A collator that draws at random which tokens are
    the answer (masked language modelling) may leave a row without one: the row is left out, and others are taken. The
    random state is left as it was.

    Args:
        loader: the training dataloader: its dataset and its collator are used, not its order.
        size: how many examples; fewer if the dataset is smaller.
        seed: of the choice.

    Raises:
        NoAnswersError: no example has answer tokens.
        ValueError: the batches have no labels.
    """
    with _own_random_state(seed):
        candidates = islice(_candidates(loader.dataset, seed), 4 * size + 64)
        answering = (example for example in candidates if _has_answer(loader.collate_fn([example])))
        batches: list[dict[str, Any]] = []
        missing = size
        while missing and (group := list(islice(answering, min(BATCH, missing)))):
            batch = dict(loader.collate_fn(group))
            answered = _answered(batch)
            missing -= len(group) - int((~answered).sum())  # a collator may pack several examples in a row
            if answered.any():
                batches.append(batch if answered.all() else _rows(batch, answered))
        if not batches:
            raise NoAnswersError(
                "No example of the training data has answer tokens: all labels are -100. The attribution (and the "
                "loss) need labels on the answer; check the tokenization, truncation and chat template."
            )
        return batches


def _candidates(dataset: Any, seed: int) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        for example in dataset:  # noqa: UP028 - `yield from` would close a generator that is handed out again
            yield example
        return
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    for index in order.tolist():
        yield dataset[index]


def _has_answer(batch: Mapping[str, Any]) -> bool:
    return bool(_answered(batch).any())


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


def _rows(batch: Mapping[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
    """The chosen rows of a batch; what is no tensor with a row for each example stays as it is."""

    def has_rows(value: Any) -> bool:
        return torch.is_tensor(value) and value.dim() > 0 and len(value) == len(chosen)

    return {name: value[chosen] if has_rows(value) else value for name, value in batch.items()}
