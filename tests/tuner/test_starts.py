"""Starts of A outside of the span of the history's rows (Eq. 4), against decompositions of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
import torch

from peft_aso.tuner.low_rank import LowRank, MissingInputsError
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


def stored(x: torch.Tensor, directions: int) -> torch.Tensor:
    """What a task stores of its inputs `(n, in)`."""
    _, singular, vectors = torch.linalg.svd(x.double(), full_matrices=False)
    return (vectors * singular[:, None] * x.shape[1] ** 0.5 / singular.norm())[:directions]


def test_contrast_is_the_generalized_eigenvalue_problem(fresh_seed: int):
    width, psi = 10, torch.tensor([0.5, -1.0])
    old, new = [torch.randn(300, width).double() * (torch.rand(width) + 0.1) for _ in range(2)], torch.randn(90, width)
    new = new.double() * (torch.rand(width) + 0.1)
    history = [LowRank(torch.randn(2, width), torch.randn(4, 2), 1.0, stored(x, width)) for x in old]
    A = torch.randn(3, width)
    found = STARTS["contrast"](A, history, new.T @ new, psi, ridge=0.2, row_scale=2.0).double()
    moments = [(x.T @ x * width / x.square().sum()).numpy() for x in (*old, new)]
    together = (0.25 * moments[0] + moments[1]) / 2 + 0.2 * np.eye(width)
    _, vectors = scipy.linalg.eigh(moments[2], together)
    expected = torch.tensor(vectors[:, :-4:-1].T.copy())
    cosines = torch.nn.functional.cosine_similarity(found, expected).abs()
    torch.testing.assert_close(cosines, torch.ones(3).double(), rtol=0, atol=1e-4)
    energy = (new @ found.T).square().mean(0)  # each row is as strong as it is asked for
    usual = (new @ A.double().T).square().mean()
    torch.testing.assert_close(energy, (4 * usual).expand(3), rtol=1e-4, atol=0)
    assert torch.equal(STARTS["contrast"](A, [], new.T @ new), A), "a first task"


def test_inflora_is_outside_of_what_spans_the_earlier_inputs(fresh_seed: int):
    x, y = (torch.randn(200, 3).double() @ torch.randn(3, 12).double() for _ in range(2))  # three directions each
    new = torch.randn(100, 12).double()
    history = [LowRank(torch.randn(2, 12), torch.randn(4, 2), 1.0, stored(each, 3)) for each in (x, y)]
    found = STARTS["inflora"](torch.randn(4, 12), history, new.T @ new, energy=0.9999).double()
    seen = torch.cat([x, y])
    assert (seen @ found.T).norm() < 1e-4 * seen.norm()
    torch.testing.assert_close(found @ found.T, torch.eye(4).double() / 3, rtol=0, atol=1e-5)
    left = new - new @ torch.linalg.pinv(seen) @ seen
    best = torch.linalg.svdvals(left)[:4].square() / 3
    torch.testing.assert_close((new @ found.T).square().sum(0), best, rtol=1e-4, atol=0)
    loose = STARTS["inflora"](torch.randn(4, 12), history, new.T @ new, energy=0.3).double()
    assert (seen @ loose.T).norm() > 1e-2 * seen.norm(), "a smaller memory"


@pytest.mark.parametrize("name", ["contrast", "inflora"])
def test_an_earlier_task_without_input_directions_is_an_error(name: str):
    with pytest.raises(MissingInputsError, match="update_input_memory"):
        STARTS[name](torch.randn(2, 6), history_of(torch.randn(2, 6)), torch.eye(6).double())


def test_options_of_a_start_are_checked():
    assert config_for(project_init="contrast", start_options={"ridge": 0.1}).start_options == {"ridge": 0.1}
    with pytest.raises(ValueError, match=r"\['energy'\] and no \['ridge'\]"):
        config_for(project_init="inflora", start_options={"ridge": 0.1})


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
