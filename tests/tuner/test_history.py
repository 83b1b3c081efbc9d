"""Names alone: which adapter is the history of which."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_aso.tuner.history import (
    HistoryError,
    MissingHistoryError,
    TaskHistory,
    adapter_of,
    holder_of,
    settle_history,
)


def task(history: list[str] | None = None, **settings: Any) -> Any:
    """A stand-in for a config: what this room reads of one."""
    defaults = {"task_name": None, "combined": False, "peft_aso_version": None, "chain": None}
    defaults |= {"forward_history": "stacked", "history_form": "auto", "train_a": True}
    return SimpleNamespace(history=history, **{**defaults, **settings})


def add(configs: dict[str, Any], name: str, config: Any) -> Any:
    configs[name] = config
    settle_history(name, configs)
    return config


def test_all_tasks_that_are_there_are_the_history():
    configs: dict[str, Any] = {}
    assert add(configs, "one", task()).history == []
    assert add(configs, "two", task()).history == ["one"]
    add(configs, "mixture", task([], combined=True))
    assert add(configs, "three", task()).history == ["one", "two"]  # combined adapters are no tasks
    assert [config.task_name for config in configs.values()] == ["one", "two", "mixture", "three"]


def test_a_named_history_takes_task_names_and_adapter_names():
    configs: dict[str, Any] = {}
    add(configs, "default", task(task_name="dbpedia"))
    add(configs, "amazon", task())
    assert add(configs, "x", task(["default"])).history == ["dbpedia"]
    assert add(configs, "y", task(["dbpedia"])).history == ["dbpedia"]
    assert add(configs, "z", task(["default", "dbpedia"])).history == ["dbpedia"]  # twice the same
    assert add(configs, "w", task(["amazon", "dbpedia"])).history == ["amazon", "dbpedia"]  # in this order


def test_a_task_s_name_comes_before_an_adapter_s():
    configs = {"amazon": task(task_name="yelp"), "yelp": task(task_name="amazon")}
    assert adapter_of("yelp", configs) == "amazon" and adapter_of("amazon", configs) == "yelp"
    assert adapter_of("yelp", {"yelp": task(task_name="other")}) == "yelp"
    assert holder_of("yelp", {"yelp": task(task_name="other")}) is None
    assert adapter_of("imdb", configs) is None


def test_the_history_of_a_saved_task_is_never_an_adapter_that_only_has_the_name():
    configs: dict[str, Any] = {"one": task([], task_name="something else")}
    add(configs, "two", task(["one"], peft_aso_version="0.1.0"))
    tasks = TaskHistory()
    tasks.refresh(configs)
    assert tasks.histories["two"] == () and tasks.missing == {"two": ("one",)}


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    configs: dict[str, Any] = {"one": task([])}
    with pytest.raises(HistoryError, match="no task 'imdb'.*It holds: 'one'.*Load it first"):
        add(configs, "two", task(["imdb"]))


def test_a_saved_task_may_come_before_its_history():
    configs: dict[str, Any] = {}
    add(configs, "three", task(["one", "two"], peft_aso_version="0.1.0"))
    tasks = TaskHistory()
    tasks.refresh(configs)
    assert tasks.missing == {"three": ("one", "two")} and tasks.histories == {"three": ()}
    with pytest.raises(MissingHistoryError, match="'one', 'two'.*load_adapter.*only\\('three'\\)"):
        tasks.require(["three"])
    add(configs, "two", task(["one"], peft_aso_version="0.1.0"))
    add(configs, "default", task([], task_name="one", peft_aso_version="0.1.0"))
    tasks.refresh(configs)
    assert not tasks.missing
    assert tasks.histories == {"three": ("default", "two"), "two": ("default",), "default": ()}
    assert tasks.frozen == {"default", "two"} and tasks.dependents("default") == ["three", "two"]
    tasks.require(["three"])


def test_a_new_task_cannot_be_built_on_one_that_lacks_its_history():
    configs: dict[str, Any] = {}
    add(configs, "two", task(["one"], peft_aso_version="0.1.0"))
    with pytest.raises(HistoryError, match="'three' would be trained on top of 'two', which lacks.*'one'"):
        add(configs, "three", task())
    del configs["three"]
    assert add(configs, "three", task(["two"])).history == ["two"]  # said in so many words


def test_one_adapter_a_task():
    configs: dict[str, Any] = {"one": task([])}
    with pytest.raises(HistoryError, match="holds the task 'one' already, in the adapter 'one'.*'again'"):
        add(configs, "again", task(task_name="one"))
    del configs["again"]
    with pytest.warns(UserWarning, match="'one' and 'again' both hold the task 'one'"):
        add(configs, "again", task([], task_name="one", peft_aso_version="0.1.0"))
    assert holder_of("one", configs) == "one"


@pytest.mark.parametrize("own", [None, "yelp"])
def test_a_task_in_its_own_history(own: str | None):
    configs: dict[str, Any] = {"one": task([])}
    with pytest.raises(HistoryError, match="own history|no task"):
        add(configs, "two", task([own or "two"], task_name=own))
    with pytest.raises(HistoryError, match="leads back to itself: x -> x"):
        add({}, "x", task(["x"], peft_aso_version="0.1.0"))


def test_a_cycle_is_named():
    saved = {"peft_aso_version": "0.1.0"}
    configs: dict[str, Any] = {}
    add(configs, "one", task(["three"], **saved))
    add(configs, "two", task(["one"], **saved))
    with pytest.raises(HistoryError, match="leads back to itself: three -> two -> one -> three"):
        add(configs, "three", task(["two"], **saved))


def test_a_long_chain_takes_no_time():
    """Every task has all earlier ones as history: the number of paths through such a chain doubles a task."""
    configs: dict[str, Any] = {}
    start = time.perf_counter()
    for number in range(120):
        add(configs, f"task{number}", task())
    assert time.perf_counter() - start < 20
    assert len(configs["task119"].history) == 119


@given(st.lists(st.lists(st.integers(0, 7), max_size=4, unique=True), min_size=8, max_size=8))
def test_a_cycle_is_found_exactly_where_there_is_one(parents: list[list[int]]):
    configs = {str(i): task([str(p) for p in ps], peft_aso_version="0.1.0") for i, ps in enumerate(parents)}
    for number in range(8):
        reached, to_visit = set(), [number]
        while to_visit:
            for parent in parents[to_visit.pop()]:
                if parent not in reached:
                    reached.add(parent)
                    to_visit.append(parent)
        if number in reached:
            with pytest.raises(HistoryError, match="leads back to itself"):
                settle_history(str(number), configs)
        else:
            settle_history(str(number), configs)


def test_expand_puts_each_history_before_its_task_and_each_name_once():
    tasks = TaskHistory()
    tasks.refresh({"one": task([]), "two": task(["one"]), "three": task(["one", "two"]), "free": task([])})
    assert tasks.expand(["three"]) == ["one", "two", "three"]
    assert tasks.expand(["two", "three", "free"]) == ["one", "two", "three", "free"]
    tasks.alone = True
    assert tasks.expand(["three"]) == ["three"]


def test_alone_a_task_needs_no_history():
    tasks = TaskHistory()
    tasks.refresh({"two": task(["one"])})
    tasks.alone = True
    tasks.require(["two"])


def test_isolated_tasks_are_known():
    tasks = TaskHistory()
    tasks.refresh({"one": task([]), "two": task(["one"], forward_history="isolated")})
    assert tasks.isolated == {"two"}


def test_tasks_that_were_loaded_in_any_order_are_the_history_oldest_first():
    configs: dict[str, Any] = {}
    for name, history in (("three", ["one", "two"]), ("two", ["one"]), ("one", []), ("four", ["one", "two", "three"])):
        add(configs, name, task(history, peft_aso_version="0.1.0"))
    assert add(configs, "five", task()).history == ["one", "two", "three", "four"]
