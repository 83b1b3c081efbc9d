"""Eq. 4-7 on plain tensors, against the equation written out in loops and against O-LoRA's published loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_aso.tuner.orthogonality import (
    group_history,
    norm_penalty,
    orthogonality_penalty,
    project_out,
)

Rows = dict[str, list[tuple[int, torch.Tensor]]]


def equation_7(history: Rows, current: dict[str, torch.Tensor], psi: Any, form: str = "squared") -> float:
    """sum_t sum_modules sum_jk (psi_t (A_t^T A_T)[j,k])^2 as five nested loops, in Python's float64.

    `psi(t, module)` is the coefficient. The paper's A is in x r: column j of A_t is row j here.
    """
    total = 0.0
    for task in sorted({task for pairs in history.values() for task, _ in pairs}):
        for module in current:
            for t, rows in history.get(module, []):
                if t != task:
                    continue
                for j in range(rows.shape[0]):
                    for k in range(current[module].shape[0]):
                        product = 0.0
                        for i in range(rows.shape[1]):
                            product += float(rows[j, i]) * float(current[module][k, i])
                        value = psi(task, module) * product
                        total += value * value if form == "squared" else abs(value)
    return total


@st.composite
def problems(draw: Any) -> tuple[Rows, dict[str, torch.Tensor], list[list[float]], int]:
    """Modules of random sizes, earlier tasks with random ranks that have some of them, and psi a task and layer."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tasks = draw(st.integers(1, 4))
    history: Rows = {}
    current: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from([3, 4, 5]))
        name = f"layers.{number}.proj"
        if draw(st.booleans()) or not current:
            current[name] = torch.randn(draw(st.integers(1, 3)), size, generator=generator)
        history[name] = [
            (task, torch.randn(draw(st.integers(1, 3)), size, generator=generator))
            for task in range(tasks)
            if draw(st.booleans())
        ]
    numbers = st.floats(-0.5, 2, width=32)
    psi = draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=tasks, max_size=tasks))
    return history, current, psi, tasks


def _layer(module: str) -> int:
    return int(module.split(".")[1])


@given(problems(), st.sampled_from(["squared", "l1"]))
@settings(max_examples=60)
def test_equation_7(problem: Any, form: str):
    history, current, psi, _ = problem
    groups = group_history(history, current)
    by_task = torch.tensor([row[0] for row in psi])
    found = orthogonality_penalty(groups, current, by_task, form)
    expected = equation_7(history, current, lambda task, _: psi[task][0], form)
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    layers = {module: _layer(module) for module in current}
    found = orthogonality_penalty(groups, current, torch.tensor(psi), form, layers)
    expected = equation_7(history, current, lambda task, module: psi[task][_layer(module)], form)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(problems())
@settings(max_examples=60)
def test_groups_hold_each_row_of_the_shared_modules_once(problem: Any):
    history, current, _, _ = problem
    groups = group_history(history, current)
    shared = [module for module in current if history.get(module)]
    assert sorted(module for group in groups for module in group.modules) == sorted(shared)
    for group in groups:
        assert group.rows.dtype == torch.float32 and not group.rows.requires_grad
        assert group.rows.shape[:2] == group.tasks.shape
        assert len({current[module].shape for module in group.modules}) == 1
        for index, module in enumerate(group.modules):
            assert torch.equal(group.rows[index], torch.cat([rows for _, rows in history[module]]))
            expected = [task for task, rows in history[module] for _ in range(rows.shape[0])]
            assert group.tasks[index].tolist() == expected


def test_modules_of_one_shape_are_one_group():
    current = {f"m{i}": torch.randn(2, 8) for i in range(6)} | {"other": torch.randn(2, 4)}
    history: Rows = {
        name: [(0, torch.randn(3, m.shape[1])), (1, torch.randn(1, m.shape[1]))] for name, m in current.items()
    }
    groups = group_history(history, current)
    assert [len(group.modules) for group in groups] == [6, 1]
    assert groups[0].rows.shape == (6, 4, 8)


def test_adapters_for_another_model_are_refused():
    history: Rows = {"m": [(0, torch.ones(1, 8)), (1, torch.ones(1, 4))]}
    with pytest.raises(ValueError, match="m: .*size 8, earlier task 1 of size 4.*different base models"):
        group_history(history, {"m": torch.ones(1, 8)})


def test_psi_1_and_l1_is_o_lora_s_published_loss():
    """Value and gradients of sum |A_old A_new^T| over a double loop of parameter names."""
    torch.manual_seed(1)
    names = [f"encoder.block.{i}.SelfAttention.{p}" for i in range(3) for p in "qv"]
    old = {f"{name}.loranew_A_old": torch.randn(6, 10) for name in names}  # two tasks of rank 3, stacked
    new = {name: torch.randn(3, 10, requires_grad=True) for name in names}

    published = torch.zeros(())
    for name, parameter in old.items():
        for other, trained in new.items():
            if name.split(".loranew_A_old")[0] == other:
                published = published + torch.abs(torch.mm(parameter, trained.T)).sum()
    expected = torch.autograd.grad(published, list(new.values()))

    history: Rows = {
        name: [(0, old[f"{name}.loranew_A_old"][:3]), (1, old[f"{name}.loranew_A_old"][3:])] for name in names
    }
    ours = orthogonality_penalty(group_history(history, new), new, torch.ones(2), "l1")
    torch.testing.assert_close(ours, published)
    for found, grad in zip(torch.autograd.grad(ours, list(new.values())), expected, strict=True):
        torch.testing.assert_close(found, grad)


def test_the_gradient_is_the_equation_s():
    torch.manual_seed(2)
    history: Rows = {"m": [(0, torch.randn(2, 5)), (1, torch.randn(3, 5))]}
    current = {"m": torch.randn(2, 5, requires_grad=True)}
    psi = torch.tensor([0.5, 1.5])
    orthogonality_penalty(group_history(history, current), current, psi).backward()
    expected = sum(2 * psi[t] ** 2 * current["m"] @ rows.T @ rows for t, rows in history["m"])
    torch.testing.assert_close(current["m"].grad, expected)


def test_float32_under_autocast():
    """Products of many small numbers: bfloat16 would lose the third digit."""
    torch.manual_seed(3)
    history: Rows = {"m": [(0, torch.randn(4, 64))]}
    current = {"m": torch.randn(4, 64, requires_grad=True)}
    groups = group_history(history, current)
    expected = orthogonality_penalty(groups, current, torch.ones(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = orthogonality_penalty(groups, current, torch.ones(1))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_half_precision_matrices_are_multiplied_in_float32():
    current = {"m": torch.randn(2, 8).bfloat16()}
    history: Rows = {"m": [(0, torch.randn(2, 8).half())]}
    found = orthogonality_penalty(group_history(history, current), current, torch.ones(1))
    assert found.item() == pytest.approx(equation_7(history, current, lambda *_: 1.0), rel=1e-5)


def test_without_history_it_is_zero():
    current = {"m": torch.randn(2, 8)}
    assert orthogonality_penalty(group_history({}, current), current, torch.ones(0)).item() == 0


def test_what_does_not_fit():
    current = {"m": torch.ones(1, 2)}
    groups = group_history({"m": [(0, torch.ones(1, 2))]}, current)
    for layers in (None, {}, {"other": 0}):
        with pytest.raises(ValueError, match=r"which layer these modules belong to: \['m'\]"):
            orthogonality_penalty(groups, current, torch.ones(1, 3), layers=layers)
    with pytest.raises(ValueError, match="penalty='l2' is not known"):
        orthogonality_penalty(groups, current, torch.ones(1), "l2")


def test_projected_out_nothing_is_left_to_penalise():
    torch.manual_seed(4)
    parts = [torch.randn(3, 16), torch.randn(2, 16)]
    parts.append(parts[0][:1] * 2)  # not a new direction
    matrix = torch.randn(4, 16)
    projected = project_out(matrix, parts)
    history: Rows = {"m": list(enumerate(parts))}
    groups = group_history(history, {"m": matrix})
    assert orthogonality_penalty(groups, {"m": matrix}, torch.ones(3)).item() > 1
    assert orthogonality_penalty(groups, {"m": projected}, torch.ones(3)).item() < 1e-9
    torch.testing.assert_close(project_out(projected, parts), projected)  # once is enough
    again = projected + torch.randn(4, 5) @ torch.cat(parts[:2])
    torch.testing.assert_close(project_out(again, parts), projected, rtol=1e-3, atol=1e-4)
    assert projected.dtype == matrix.dtype and not torch.equal(matrix, projected)


def test_projecting_out_an_empty_adapter_changes_nothing():
    matrix = torch.randn(2, 8)
    assert torch.equal(project_out(matrix, [torch.zeros(3, 8)]), matrix)


def test_projecting_out_everything_is_an_error():
    with pytest.raises(ValueError, match="span all 4 input dimensions"):
        project_out(torch.randn(1, 4), [torch.randn(3, 4), torch.randn(3, 4)])


def test_norms():
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2)
    found = norm_penalty([a, b])
    assert found.item() == pytest.approx(a.square().sum().sqrt().item() + b.square().sum().sqrt().item())
    found.backward()
    torch.testing.assert_close(a.grad, a / a.norm())
    assert norm_penalty([]).item() == 0
