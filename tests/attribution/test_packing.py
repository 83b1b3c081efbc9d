"""Examples in groups of like answers."""

from __future__ import annotations

import pytest
import torch

from peft_aso.attribution import integrated_gradients, packing
from peft_aso.attribution.answer import Answer
from peft_aso.attribution.packing import alike, of_examples
from tests.attribution.reference import largest_gap
from tests.tiny_models import tiny, tiny_batch


def answer_of(lengths: list[int], kind: str = "causal") -> Answer:
    positions = torch.zeros(len(lengths), 40, dtype=torch.bool)
    for row, length in enumerate(lengths):
        positions[row, 3 + row : 3 + row + length] = True
    stack = "single" if kind == "causal" else "encoder"
    return Answer(kind, torch.where(positions, 1, -100), {stack: positions})


@pytest.mark.parametrize(
    "lengths, groups",
    [
        ([1, 1, 1], [[0, 1, 2]]),
        ([1, 2, 3, 4, 1, 2, 3, 4], [[3, 7], [2, 6], [1, 5], [0, 4]]),
        ([20, 19, 5, 20], [[0, 1, 3], [2]]),
        ([7], [[0]]),
    ],
)
def test_equal_answers_go_together(lengths: list[int], groups: list[list[int]]) -> None:
    assert [group.tolist() for group in alike(answer_of(lengths), "single")] == groups


def test_little_is_wasted(fresh_seed: int) -> None:
    lengths = torch.randint(1, 20, (12,), generator=torch.Generator().manual_seed(fresh_seed)).tolist()
    groups = alike(answer_of(lengths), "single")
    assert sorted(torch.cat(groups).tolist()) == list(range(12))
    for group in groups:
        own = [lengths[row] for row in group.tolist()]
        assert sum(own) >= 0.9 * max(own) * len(own)


def test_an_encoder_is_not_split() -> None:
    assert [group.tolist() for group in alike(answer_of([1, 5], "seq2seq"), "encoder")] == [[0, 1]]


@pytest.mark.parametrize("waste", [0.0, 0.95])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_how_examples_are_packed_does_not_matter(
    name: str, padding: str, waste: float, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, seed=fresh_seed)
    batch = tiny_batch(model, 5, seed=fresh_seed, padding=padding, prompt=(1, 9))
    plain = integrated_gradients(model, batch, steps=3, method="plain")
    monkeypatch.setattr(packing, "_WASTE", waste)
    packed = integrated_gradients(model, batch, steps=3, method="fast")
    assert largest_gap(packed.values, plain.values) <= 1e-4
    assert torch.allclose(packed.log_probability, plain.log_probability, atol=1e-4)


def test_a_part_of_a_batch() -> None:
    inputs = {"input_ids": torch.arange(6).view(3, 2), "shared": torch.ones(1, 2)}
    answer = answer_of([1, 2, 3])
    part, own = of_examples(inputs, answer, torch.tensor([0, 2]))
    assert part["input_ids"].tolist() == [[0, 1], [4, 5]] and part["shared"].shape == (1, 2)
    assert torch.equal(own.positions["single"], answer.positions["single"][[0, 2]])
    assert of_examples(inputs, answer, torch.arange(3)) == (inputs, answer)
