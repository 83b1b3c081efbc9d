"""The store of psi: tensors that are updated in place, and clear errors for what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_aso.tuner.psi import CoefficientStore

CPU = torch.device("cpu")


def test_ones_before_any_update():
    psi, layers = CoefficientStore().tensor("three", ["one", "two"], CPU)
    assert psi.tolist() == [1.0, 1.0] and layers is None
    assert CoefficientStore().as_dict("three", ["one", "two"]) == {"one": 1.0, "two": 1.0}


def test_one_value_a_task():
    store = CoefficientStore()
    store.set("three", ["one", "two"], {"two": 0.25, "one": torch.tensor(1.5, dtype=torch.float64)})
    psi, layers = store.tensor("three", ["one", "two"], CPU)
    assert psi.tolist() == [1.5, 0.25] and psi.dtype == torch.float32 and layers is None
    assert store.knows("three") and not store.knows("two")


def test_one_value_a_task_and_layer():
    store = CoefficientStore()
    store.set("two", ["one"], {"one": [0.5, 0.75]}, {"a": 0, "b": 1})
    psi, layers = store.tensor("two", ["one"], CPU)
    assert psi.tolist() == [[0.5, 0.75]] and layers == {"a": 0, "b": 1}
    assert store.as_dict("two", ["one"]) == {"one": [0.5, 0.75]}
    store.set("two", ["one"], {"one": 0.125}, {"a": 0})  # one number: the layers do not matter
    psi, layers = store.tensor("two", ["one"], CPU)
    assert psi.tolist() == [0.125] and layers is None


def test_an_update_is_seen_by_who_holds_the_tensor():
    store = CoefficientStore()
    store.set("two", ["one"], {"one": 0.5})
    held, _ = store.tensor("two", ["one"], CPU)
    store.set("two", ["one"], {"one": 0.25})
    assert held.tolist() == [0.25] and store.tensor("two", ["one"], CPU)[0] is held


def test_it_keeps_no_memory_of_the_caller_s():
    values = torch.tensor([0.5])
    store = CoefficientStore()
    store.set("two", ["one"], {"one": values[0]})
    values.fill_(9)
    assert store.as_dict("two", ["one"]) == {"one": 0.5}


def test_set_in_inference_mode_and_used_in_training():
    store = CoefficientStore()
    for value in (0.5, 0.25):
        with torch.inference_mode():
            store.set("two", ["one"], {"one": torch.tensor(value)})
    store.set("two", ["one"], {"one": 0.125})
    psi, _ = store.tensor("two", ["one"], CPU)
    x = torch.ones(1, requires_grad=True)
    (x * psi).sum().backward()
    assert x.grad.tolist() == [0.125]


def test_a_history_of_another_length_has_ones_again():
    store = CoefficientStore()
    store.set("three", ["one"], {"one": 0.5})
    assert store.as_dict("three", ["zero", "one"]) == {"zero": 1.0, "one": 1.0}


def test_forgotten():
    store = CoefficientStore()
    store.set("two", ["one"], {"one": 0.5})
    store.forget("two")
    store.forget("never there")
    assert not store.knows("two") and store.as_dict("two", ["one"]) == {"one": 1.0}


@pytest.mark.parametrize(
    ("psi", "layers", "message"),
    [
        ({"one": 0.5}, None, r"psi is given for \['one'\], but the history of 'three' is \['one', 'two'\]"),
        ({"one": 0.5, "two": 1, "x": 1}, None, "Give one value for each"),
        ({"one": float("nan"), "two": 1}, None, "must be finite"),
        ({"one": float("inf"), "two": 1}, None, "must be finite"),
        ({"one": [1, 2], "two": [1, 2, 3]}, {}, "same count of numbers"),
        ({"one": [1, 2], "two": 1}, {}, "same count of numbers"),
        ({"one": [[1.0]], "two": [[1.0]]}, {}, "one number a task"),
        ({"one": [1, 2], "two": [1, 2]}, None, "say with `layer_of`"),
        ({"one": [1, 2], "two": [1, 2]}, {"a": 2}, "has 2 layers, but layer_of names others: {'a': 2}"),
    ],
)
def test_what_does_not_fit(psi: dict[str, Any], layers: dict[str, int] | None, message: str):
    store = CoefficientStore()
    with pytest.raises(ValueError, match=message):
        store.set("three", ["one", "two"], psi, layers)
    assert not store.knows("three")


def test_a_first_task_has_none():
    store = CoefficientStore()
    store.set("one", [], {})
    assert store.as_dict("one", []) == {}
