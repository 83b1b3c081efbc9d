"""The order of tasks from their histories."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_aso import ASOLoraConfig
from peft_aso.chain import ChainError
from peft_aso.chain.order import in_order
from peft_aso.chain.reading import AdapterFile


def adapter(name: str, history: list[str]) -> AdapterFile:
    return AdapterFile(Path("chain") / name, name, ASOLoraConfig(history=history))


@given(st.integers(1, 8), st.randoms(use_true_random=False))
def test_every_task_after_its_history(size: int, rng: random.Random) -> None:
    names = [f"task{index}" for index in range(size)]
    adapters = [
        adapter(name, sorted(rng.sample(names[:index], rng.randint(0, index)))) for index, name in enumerate(names)
    ]
    rng.shuffle(adapters)
    placed: list[str] = []
    for entry in in_order(adapters):
        assert set(entry.history) <= set(placed)
        placed.append(entry.name)
    assert sorted(placed) == sorted(names)


def test_unrelated_tasks_keep_the_given_order() -> None:
    given_order = [adapter(name, []) for name in ("c", "a", "b")]
    assert [entry.name for entry in in_order(given_order)] == ["c", "a", "b"]


def test_chosen_tasks_bring_their_histories() -> None:
    adapters = [adapter("a", []), adapter("b", ["a"]), adapter("c", ["b"]), adapter("d", ["a", "b", "c"])]
    assert [entry.name for entry in in_order(adapters, ["c"])] == ["a", "b", "c"]
    assert [entry.name for entry in in_order(adapters, "b")] == ["a", "b"]


@pytest.mark.parametrize(
    ("adapters", "tasks", "message"),
    [
        ([("a", []), ("b", ["a", "x", "y"])], None, "'b' was trained on top of 'x', 'y', which are not here"),
        ([("b", ["x"])], None, "'x', which is not here.*list of all adapter folders"),
        ([("a", ["b"]), ("b", ["a"])], None, "cycle: a -> b -> a"),
        ([("z", ["a"]), ("a", ["b"]), ("b", ["a"])], None, "cycle: a -> b -> a"),
        ([("a", ["a"])], None, "cycle: a -> a"),
        ([("a", []), ("a", [])], None, "Two folders hold a task called 'a'"),
        ([("a", [])], ["b"], "no task 'b' here. There are: 'a'"),
        ([("a", [])], [], "tasks is an empty list"),
    ],
)
def test_what_cannot_be_ordered(adapters: list[tuple[str, list[str]]], tasks: list[str] | None, message: str) -> None:
    with pytest.raises(ChainError, match=message):
        in_order([adapter(*entry) for entry in adapters], tasks)
