"""The probe: fixed, drawn without disturbing the run, only examples with an answer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from peft_aso.training.probe import choose_probe
from tests.tiny_models import tiny
from tests.training.tools import TinyTask


def loader(data, collate=None):
    return DataLoader(data, batch_size=4, collate_fn=collate or torch.utils.data.default_collate)


def test_same_seed_same_probe_and_no_random_number_is_used_up() -> None:
    data = TinyTask(tiny("llama"), size=30)

    def collate(examples):
        torch.rand(3), np.random.rand(), random.random()
        return torch.utils.data.default_collate(examples)

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = choose_probe(loader(data, collate), 10, seed=1)
    again = choose_probe(loader(data), 10, seed=1)
    other = choose_probe(loader(data), 10, seed=2)
    assert [len(batch["labels"]) for batch in first] == [8, 2]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


def test_examples_without_answer_are_passed_over() -> None:
    data = TinyTask(tiny("llama"), size=12)
    data.batch["labels"][:9] = -100
    (batch,) = choose_probe(loader(data), 8, seed=0)
    assert len(batch["labels"]) == 3
    assert ((batch["labels"] != -100).sum(1) > 0).all()


def test_a_stream_gives_its_first_examples() -> None:
    data = TinyTask(tiny("llama"), size=6)

    class Stream(IterableDataset):
        def __iter__(self):
            return (data[index] for index in range(len(data)))

    (batch,) = choose_probe(loader(Stream()), 4, seed=0)
    assert torch.equal(batch["input_ids"], data.batch["input_ids"][:4])


@pytest.mark.parametrize("width", [5, 8, 20])
def test_a_collator_that_draws_the_answers_leaves_no_row_without_one(width: int, fresh_seed: int) -> None:
    """Masked language modelling at 15%: a row that had an answer alone may have none in its batch."""
    rows = torch.arange(100)[:, None].expand(100, width)

    def masked(examples: list[torch.Tensor]) -> dict[str, Any]:
        ids = torch.stack(examples)
        labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
        return {"input_ids": ids, "labels": labels, "scale": torch.tensor(2.0), "weights": torch.ones(9), "text": "x"}

    seed = fresh_seed % 1000
    states = torch.get_rng_state(), random.getstate()
    probe = choose_probe(loader(rows, masked), 12, seed)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.rand(7)  # whatever was drawn before, the seed decides
    again = choose_probe(loader(rows, masked), 12, seed)
    found = torch.cat([batch["input_ids"] for batch in probe])
    assert len(found) == 12 and len(found[:, 0].unique()) == 12
    for batch, same in zip(probe, again, strict=True):
        answers = batch["labels"] != -100
        assert answers.any(1).all() and torch.equal(batch["labels"][answers], batch["input_ids"][answers])
        assert torch.equal(batch["labels"], same["labels"])
        assert batch["scale"] == 2 and len(batch["weights"]) == 9 and batch["text"] == "x"


def test_no_answers_at_all_and_no_labels_are_errors() -> None:
    data = TinyTask(tiny("llama"), size=4)
    data.batch["labels"][:] = -100
    with pytest.raises(ValueError, match="all labels are -100"):
        choose_probe(loader(data), 4, seed=0)
    del data.batch["labels"]
    data.__class__ = type("Bare", (TinyTask,), {"__len__": lambda self: 4})
    with pytest.raises(ValueError, match="have no `labels`"):
        choose_probe(loader(data), 4, seed=0)


def test_a_stream_that_hands_out_one_generator_stays_open() -> None:
    data = TinyTask(tiny("llama"), size=8)

    class Once(IterableDataset):
        rows = (data[index] for index in range(len(data)))

        def __iter__(self):
            return self.rows

    stream = Once()
    choose_probe(loader(stream), 4, seed=0)
    assert len(list(stream)) == 4
