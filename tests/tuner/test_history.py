"""Which adapter is the history of which: names, order, cycles, tasks that are not loaded."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_aso import ASOLoraConfig, HistoryError, MissingHistoryError
from peft_aso.tuner.history import adapter_of, is_folder_name, is_free, name_parts, oldest_first


def net() -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(2, 2), "token": nn.ParameterDict({"weight": torch.ones(2)})})


class Chain:
    """Adapters of one small model; `saved` ones are as read from a file, so that their history may come later."""

    def __init__(self) -> None:
        self.model: Any = get_peft_model(net(), ASOLoraConfig(r=1, target_modules=["proj"], history=[]), "first")
        self.tasks = self.model.base_model.tasks

    def add(self, name: str, history: list[str] | None = None, saved: bool = False, task: str | None = None) -> Any:
        """Add an adapter and return its history as its config has it afterwards."""
        config = ASOLoraConfig(r=1, target_modules=["proj"], history=history, task_name=task)
        config.peft_aso_version = "0.1.0" if saved else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was trained on top of")
            self.model.add_adapter(name, config)
        return self.model.peft_config[name].history


def test_a_history_takes_task_names_and_adapter_names():
    held = Chain()
    held.add("default", [], task="dbpedia")
    held.add("amazon", [])
    assert held.add("x", ["default"]) == ["dbpedia"] == held.add("y", ["dbpedia"])
    assert held.add("w", ["amazon", "dbpedia"]) == ["amazon", "dbpedia"], "in the order given"
    assert held.tasks.histories["w"] == ("amazon", "default")
    configs = {"amazon": SimpleNamespace(task_name="yelp"), "yelp": SimpleNamespace(task_name="amazon")}
    assert adapter_of("yelp", configs) == "amazon", "the name of a task comes first"
    assert adapter_of("yelp", {"yelp": SimpleNamespace(task_name="other")}) == "yelp"
    held.add("one", [], task="something else")
    held.add("two", ["one"], saved=True)
    assert held.tasks.missing == {"two": ("one",)}, "a saved history is never an adapter that only has the name"


def test_unknown_names_and_second_adapters_for_a_task():
    held = Chain()
    for name, history, task in (("x", ["imdb"], None), ("x", ["x"], None), ("x", ["yelp"], "yelp")):
        with pytest.raises(HistoryError):
            held.add(name, history, task=task)
    with pytest.raises(HistoryError, match="'first'.*'again'"):
        held.add("again", task="first")
    assert list(held.model.peft_config) == ["first"]
    held.add("one")
    with pytest.warns(UserWarning, match="'one' and 'again'"):
        held.add("again", [], saved=True, task="one")
    held.add("two", ["one"])
    assert held.tasks.histories["two"] == ("one",), "the first of the two"


def test_a_saved_task_may_come_before_its_history():
    held = Chain()
    held.add("three", ["one", "two"], saved=True)
    assert held.tasks.missing == {"three": ("one", "two")} and held.tasks.histories["three"] == ()
    with pytest.raises(MissingHistoryError, match="'one', 'two'"):
        held.tasks.require(["three"])
    with pytest.raises(HistoryError, match="'four'.*'three'.*'one'"):
        held.add("four")  # on top of all, and one of them lacks its history
    assert held.add("four", ["three"]) == ["three"]
    held.add("two", ["one"], saved=True)
    held.add("default", [], saved=True, task="one")
    assert not held.tasks.missing and held.tasks.histories["three"] == ("default", "two")
    assert held.tasks.frozen == {"default", "two", "three"} and held.tasks.dependents("default") == ["three", "two"]
    assert list(held.tasks.expand(["two", "three", "first"])) == ["default", "two", "three", "first"]


def test_a_cycle_is_named():
    held = Chain()
    with pytest.raises(HistoryError, match="x -> x"):
        held.add("x", ["x"], saved=True)
    held.add("one", ["three"], saved=True)
    held.add("two", ["one"], saved=True)
    with pytest.raises(HistoryError) as error:
        held.add("three", ["two"], saved=True)
    rotations = ("three -> two -> one -> three", "two -> one -> three -> two", "one -> three -> two -> one")
    assert any(path in str(error.value) for path in rotations)
    assert list(held.model.peft_config) == ["first", "one", "two"]


@given(st.lists(st.lists(st.integers(0, 5), max_size=3, unique=True), min_size=6, max_size=6))
@settings(max_examples=20)
def test_a_cycle_is_refused_exactly_where_there_is_one(parents: list[list[int]]):
    held, there = Chain(), set()
    for number in range(6):
        reached, size = {*parents[number]}, 0
        while len(reached) > size:
            size = len(reached)
            reached |= {old for node in reached & there for old in parents[node]}
        with pytest.raises(HistoryError) if number in reached else nullcontext():
            held.add(str(number), [str(parent) for parent in parents[number]], saved=True)
            there.add(number)
    assert set(held.model.peft_config) == {"first", *map(str, there)}


def test_all_tasks_that_are_there_are_the_history_oldest_first():
    saved = {"three": ["one", "two"], "two": ["one"], "one": [], "four": ["one", "two", "three"]}
    assert list(oldest_first(saved)) == ["one", "two", "three", "four"]
    held = Chain()
    for name, history in saved.items():
        held.add(name, history, saved=True)
    held.model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mixture", combination_type="cat")
    assert [task for task in held.add("five") if task != "first"] == ["one", "two", "three", "four"]
    assert held.model.peft_config["five"].task_name == "five"
    assert len(oldest_first({str(n): [str(m) for m in range(n)] for n in range(200)})) == 200  # 2^198 paths


@pytest.mark.parametrize("name", ["token", "proj", "weight", "a.b", "a/b", "", "lora_A", "base_model", "__base__"])
def test_names_that_peft_would_confuse(name: str):
    """Adapter names that are parts of module paths, and others by which PEFT cannot find an adapter."""
    assert not is_free(name, name_parts(net()))
    for good in ("dbpedia", "task-1", "12", "lora", "my model", "ü"):
        assert is_free(good, name_parts(net())) and is_folder_name(good)
    held = Chain()
    for call in (lambda: get_peft_model(net(), held.model.peft_config["first"], name), lambda: held.add(name)):
        with pytest.raises(ValueError, match="cannot be called|Adapter name"):
            call()
    assert list(held.model.peft_config) == ["first"]


@pytest.mark.parametrize("name", ["sst2/v1", ".x", "a\\b", "a\0b", "proj"])
def test_a_task_name_that_no_chain_could_have_is_refused_before_training(name: str):
    with pytest.raises(ValueError, match="cannot be called"):
        Chain().add("second", task=name)
    assert name == "proj" or not is_folder_name(name)
