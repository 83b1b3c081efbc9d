"""Long histories: a pass in training looks at some of their weights, in turn; all other passes look at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peft_aso.tuner.kept import GLANCE, Watch
from tests.tiny_models import tiny_batch
from tests.tuner.chains import chain, fill

TASKS = tuple(f"task{index}" for index in range(20))
PASSES = 2  # two matrices of each of 19 earlier tasks, and the base weight: two times GLANCE


@pytest.fixture(scope="module")
def made() -> Any:
    return chain("llama", TASKS)[1]


@pytest.fixture
def model(made: Any) -> Any:
    return copy.deepcopy(made).train()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model)).logits


def plain(model: Any) -> torch.Tensor:
    """What a copy that has looked at nothing yet computes."""
    return output(copy.deepcopy(model))


def layers(model: Any) -> list[Any]:
    return list(model.base_model.lora_layers().values())


def write(model: Any, task: str = "task11") -> None:
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A[task].weight.mul_(3)


def test_a_watch_that_looks_at_some_sees_all_in_turn(fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    parts = nn.ModuleDict({str(index): nn.Linear(2, 2, bias=False) for index in range(10)})
    slots = [(part._parameters, "weight") for part in parts.values()]

    def watch() -> Watch:
        return Watch(slots, [(parts.__dict__, "_modules")])

    for _ in range(20):
        changed = str(int(torch.randint(10, (), generator=generator)))
        before = watch()
        for _ in range(int(torch.randint(5, (), generator=generator))):
            assert before.unchanged(4)
        with torch.no_grad():
            parts[changed].weight.add_(1)
        assert not all(before.unchanged(4) for _ in range(3))
        assert not before.unchanged()
        assert not before.unchanged(10) and not before.unchanged(100)
    before = watch()
    parts["3"] = nn.Linear(2, 2, bias=False)
    assert not before.unchanged(1)  # tables are looked at in every call


def test_the_history_here_is_too_long_for_one_look(model: Any) -> None:
    assert GLANCE < 2 * (len(TASKS) - 1) <= PASSES * GLANCE


def test_in_training_a_write_by_hand_is_seen_within_a_few_passes(model: Any) -> None:
    output(model)
    write(model)
    for _ in range(PASSES):
        found = output(model)
    torch.testing.assert_close(found, plain(model))


def test_in_evaluation_it_is_seen_at_once(model: Any) -> None:
    before = output(model.eval())
    write(model)
    found = output(model)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, plain(model))


def _load(model: Any) -> None:
    other = copy.deepcopy(model)
    fill(other, TASKS, seed=7)
    model.load_state_dict(other.state_dict())


def _to_double_and_back(model: Any) -> None:
    write(model)
    model.double().float()


def _scale(model: Any) -> None:
    for layer in layers(model):
        layer.scaling["task11"] *= 2


def _new_modules(model: Any) -> None:
    for layer in layers(model):
        layer.lora_B["task11"] = copy.deepcopy(layer.lora_B["task12"])


def _activate(model: Any) -> None:
    model.set_adapter("task15")


@pytest.mark.parametrize("change", [_load, _to_double_and_back, _scale, _new_modules, _activate])
def test_in_training_other_changes_are_seen_at_once(model: Any, change: Callable[[Any], None]) -> None:
    before = output(model)
    change(model)
    found = output(model)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, plain(model))


def penalty(model: Any) -> torch.Tensor:
    return model.base_model.orthogonality_penalty().detach()


def test_the_penalty_sees_a_write_by_hand_within_a_few_calls(model: Any) -> None:
    penalty(model)
    write(model)
    for _ in range(PASSES):
        found = penalty(model)
    torch.testing.assert_close(found, penalty(copy.deepcopy(model)))


@pytest.mark.parametrize("change", [_load, _to_double_and_back, lambda model: write(model.eval())])
def test_the_penalty_sees_other_changes_at_once(model: Any, change: Callable[[Any], None]) -> None:
    before = penalty(model)
    change(model)
    found = penalty(model)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, penalty(copy.deepcopy(model)))
