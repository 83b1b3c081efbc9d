"""The probe: a few fixed examples of the current task's training data, on which attribution is computed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

# a batch of the probe; attribution splits it further by memory
BATCH = 8


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Collators may draw random numbers; the training must not notice."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
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

    Examples without answer tokens (all labels -100) are passed over. The random state is left as it was.

    Args:
        loader: the training dataloader: its dataset and its collator are used, not its order.
        size: how many examples; fewer if the dataset is smaller.
        seed: of the choice.

    Raises:
        ValueError: no example has answer tokens, or the batches have no labels.
    """
    with _same_random_state():
        chosen: list[Any] = []
        for example in islice(_candidates(loader.dataset, seed), 4 * size + 64):
            if _has_answer(loader.collate_fn([example])):
                chosen.append(example)
            if len(chosen) == size:
                break
        if not chosen:
            raise ValueError(
                "No example of the training data has answer tokens: all labels are -100. The attribution (and the "
                "loss) need labels on the answer; check the tokenization, truncation and chat template."
            )
        return [dict(loader.collate_fn(chosen[start : start + BATCH])) for start in range(0, len(chosen), BATCH)]


def _candidates(dataset: Any, seed: int) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        yield from dataset
        return
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    for index in order.tolist():
        yield dataset[index]


def _has_answer(batch: Any) -> bool:
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"The training batches have no `labels` (they have: {', '.join(sorted(batch))}). The attribution needs "
            "them: use a collator that adds them, or a dataset with a `labels` column."
        )
    return bool((torch.as_tensor(labels) != -100).any())
