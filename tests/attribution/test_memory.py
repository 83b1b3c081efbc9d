"""How many rows go through the model at once."""

from __future__ import annotations

import pytest
import torch

from peft_aso.attribution import memory
from peft_aso.attribution.answer import read_batch
from peft_aso.attribution.memory import RowBudget, free_memory
from peft_aso.attribution.neurons import find_neurons
from peft_aso.attribution.window import CausalWindow
from tests.tiny_models import tiny, tiny_batch


def budget(max_rows: int | None, free: int, monkeypatch: pytest.MonkeyPatch) -> RowBudget:
    model = tiny("llama")
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    return RowBudget.of(CausalWindow(model, *read_batch(model, tiny_batch(model))), find_neurons(model), max_rows)


def test_rows_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = budget(None, 2**40, monkeypatch).rows
    some = budget(None, 2**20, monkeypatch).rows
    assert plenty == memory._MOST["cpu"] > some > 1
    assert budget(None, 2**19, monkeypatch).rows == pytest.approx(some / 2, abs=1)
    assert budget(None, 1, monkeypatch).rows == 1


def test_the_callers_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = budget(7, 1, monkeypatch)
    assert own.rows == 7 and own.cost(10, 0.1) == 10


def test_rows_that_enter_higher_up_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    found = budget(None, 2**30, monkeypatch)
    assert 0 < found.head < 1
    assert found.cost(10, 1.0) == pytest.approx(10)
    assert 10 * found.head < found.cost(10, 0.5) < 10


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
