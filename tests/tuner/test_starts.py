"""Starts of A outside of the span of the history's rows (Eq. 4), against decompositions of their own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from peft_aso.tuner.low_rank import LowRank
from peft_aso.tuner.starts import STARTS, needs_inputs, register_start
from tests.tiny_models import tiny
from tests.tuner.chains import TASKS, chain, config_for


def history_of(*matrices: torch.Tensor) -> list[LowRank]:
    return [LowRank(matrix, torch.randn(5, len(matrix)), 2.0) for matrix in matrices]


def outside(rows: torch.Tensor, history: Sequence[LowRank]) -> torch.Tensor:
    """The rows less their best approximation by the history's rows: a least-squares problem in float64."""
    span = torch.cat([old.A for old in history]).double()
    solution = torch.linalg.lstsq(span.T, rows.double().T, driver="gelsd").solution
    return rows.double() - (span.T @ solution).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_is_the_part_outside_of_the_span(dtype: torch.dtype, fresh_seed: int):
    A, first, second = (torch.randn(rank, 16, dtype=dtype) for rank in (4, 3, 2))
    history = history_of(first, second, first[:1] * 2)  # the last one is not a new direction
    found = STARTS["random"](A.clone(), history)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), outside(A, history), rtol=0, atol=1e-5)
    assert all((old.A @ found.T).abs().max() < 1e-4 for old in history)
    assert torch.equal(STARTS["random"](A, []), A)


def test_inputs_are_the_leading_directions_outside_of_the_span(fresh_seed: int):
    x = torch.randn(200, 12, dtype=torch.float64) * torch.linspace(3, 0.2, 12, dtype=torch.float64)
    history = history_of(torch.randn(2, 12), torch.randn(3, 12))
    for seen, earlier in ((outside(x, history), history), (x, [])):
        found = STARTS["inputs"](torch.randn(3, 12), earlier, x.T @ x)
        _, _, directions = torch.linalg.svd(seen, full_matrices=False)
        cosines = (found.double() * directions[:3]).sum(1).abs()  # in this order; the sign is free
        torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4)
        torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("directions", [0, 2])
def test_too_few_directions_are_filled_with_others_outside_of_the_history(directions: int, fresh_seed: int):
    """No inputs, or fewer directions than A has rows."""
    x = torch.randn(50, directions, dtype=torch.float64) @ torch.randn(directions, 12, dtype=torch.float64)
    history = history_of(torch.randn(3, 12))
    found = STARTS["inputs"](torch.randn(4, 12), history, x.T @ x if directions else None).double()
    torch.testing.assert_close(found @ found.T, torch.eye(4).double(), rtol=0, atol=1e-5)
    assert (history[0].A.double() @ found.T).abs().max() < 1e-4
    torch.testing.assert_close(outside(x, history) @ found.T @ found, outside(x, history), rtol=0, atol=1e-4)


def test_a_history_that_leaves_nothing_is_an_error():
    for name, history in (("random", (3, 3)), ("inputs", (3, 3)), ("inputs", (3,))):
        with pytest.raises(ValueError, match="input dimensions"):
            STARTS[name](torch.randn(2, 4), history_of(*(torch.randn(r, 4) for r in history)), torch.eye(4).double())
    _, model = chain("llama", ["dbpedia"], r=16, target_modules=["q_proj"])
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="16 input dimensions"):
        model.add_adapter("amazon", config_for(project_init=True, target_modules=["q_proj"]))
    assert list(model.state_dict()) == before and list(model.peft_config) == ["dbpedia"]


@pytest.mark.parametrize("start", [True, "random", "inputs"])
def test_the_penalty_starts_at_zero(start: bool | str):
    """A start that needs the inputs is at first as "random"."""
    assert needs_inputs(start) == (start == "inputs")
    _, model = chain("llama", TASKS[:2], base=tiny("llama").to(torch.float32 if start is True else torch.bfloat16))
    model.add_adapter("agnews", config_for(project_init=start, r=3))
    model.set_adapter("agnews")
    assert model.base_model.orthogonality_penalty().item() < 1e-10
    for layer in model.base_model.lora_layers().values():
        assert layer.lora_A["agnews"].weight.abs().max() > 0.01 and not layer.lora_B["agnews"].weight.any()


def test_a_start_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(STARTS, "first-row", None)  # taken out again at the end

    @register_start("first-row")
    def first_row(A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None) -> torch.Tensor:
        return history[0].A[:1].expand_as(A) if history else A

    _, model = chain("llama", TASKS[:2])
    model.add_adapter("agnews", config_for(project_init="first-row"))
    for layer in model.base_model.lora_layers().values():
        assert torch.equal(layer.lora_A["agnews"].weight, layer.lora_A["dbpedia"].weight[:1].expand(2, -1))
