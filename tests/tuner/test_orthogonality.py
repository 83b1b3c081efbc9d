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


@given(problems(), st.sampled_from(["squared", "l1"]), st.sampled_from([None, 0, 100]))
@settings(max_examples=60)
def test_equation_7(problem: Any, form: str, copy_bytes: int | None):
    history, current, psi, _ = problem
    groups = group_history(history, current, copy_bytes)
    by_task = torch.tensor([row[0] for row in psi])
    found = orthogonality_penalty(groups, current, by_task, form)
    expected = equation_7(history, current, lambda task, _: psi[task][0], form)
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    layers = {module: _layer(module) for module in current}
    found = orthogonality_penalty(groups, current, torch.tensor(psi), form, layers)
    expected = equation_7(history, current, lambda task, module: psi[task][_layer(module)], form)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(problems(), st.sampled_from([None, 0, 100]))
@settings(max_examples=60)
def test_groups_hold_each_row_of_the_shared_modules_once(problem: Any, copy_bytes: int | None):
    history, current, _, _ = problem
    groups = group_history(history, current, copy_bytes)
    shared = [module for module in current if history.get(module)]
    assert sorted(module for group in groups for module in group.modules) == sorted(shared)
    for group in groups:
        assert len({current[module].shape for module in group.modules}) == 1
        for index, module in enumerate(group.modules):
            rows = torch.cat(group.parts[index]) if group.rows is None else group.rows[index]
            assert rows.dtype == torch.float32 and not rows.requires_grad
            assert torch.equal(rows, torch.cat([rows for _, rows in history[module]]))
            expected = [task for task, rows in history[module] for _ in range(rows.shape[0])]
            assert group.tasks.tolist() == expected
    copied = sum(group.rows.numel() * 4 for group in groups if group.rows is not None)
    in_place = [part for group in groups if group.rows is None for parts in group.parts for part in parts]
    if copy_bytes is None:
        assert not in_place
    else:
        assert copied <= copy_bytes
    owners = {rows.data_ptr() for pairs in history.values() for _, rows in pairs}
    assert {part.data_ptr() for part in in_place} <= owners


def test_modules_of_one_shape_are_one_group():
    current = {f"m{i}": torch.randn(2, 8) for i in range(6)} | {"other": torch.randn(2, 4)}
    history: Rows = {
        name: [(0, torch.randn(3, m.shape[1])), (1, torch.randn(1, m.shape[1]))] for name, m in current.items()
    }
    groups = group_history(history, current)
    assert [len(group.modules) for group in groups] == [6, 1]
    assert groups[0].rows is not None and groups[0].rows.shape == (6, 4, 8)
    groups = group_history(history, current, copy_bytes=2 * 4 * 4 * 8)  # two modules of the six
    assert [(len(group.modules), group.rows is None) for group in groups] == [(2, False), (4, True), (1, True)]


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


def plain(history: Rows, current: dict[str, torch.Tensor], psi: torch.Tensor, form: str, layers: dict[str, int]):
    """Eq. 7 by autograd in float64: a loop over modules and tasks."""
    total = torch.zeros((), dtype=torch.float64)
    for module, matrix in current.items():
        for task, rows in history.get(module, []):
            coefficient = psi[task] if psi.dim() == 1 else psi[task, layers[module]]
            weighted = coefficient.double() * (rows.double() @ matrix.double().T)
            total = total + (weighted.square() if form == "squared" else weighted.abs()).sum()
    return total


def has_a_kink(history: Rows, current: dict[str, torch.Tensor], margin: float = 1e-5) -> bool:
    """Does a row lie so nearly orthogonal to an earlier one that float32 cannot tell on which side of |x|'s kink?"""
    pairs = ((rows, current[module]) for module in current for _, rows in history.get(module, []))
    return any(bool(((rows.double() @ matrix.double().T).abs() < margin).any()) for rows, matrix in pairs)


def chain_of_rows(dtype: torch.dtype = torch.float32) -> tuple[Rows, dict[str, torch.Tensor], dict[str, int]]:
    """Two sizes of input, mixed ranks, modules that some tasks or the current one lack."""
    current, history, layers = {}, {}, {}
    for index in range(8):
        name, size = f"layers.{index}.proj", 24 if index % 3 else 40
        layers[name] = index // 2
        if index != 5:
            rank = 3 if index == 2 else 2
            current[name] = (torch.randn(rank, size) / size**0.5).to(dtype).requires_grad_()
        tasks = [task for task in range(12) if (task + index) % 5 or index < 3]
        history[name] = [(task, torch.randn(1 + task % 3, size).to(dtype)) for task in tasks if index != 6]
    return history, current, layers


@pytest.mark.parametrize("form", ["squared", "l1"])
@pytest.mark.parametrize("psi_shape", [(12,), (12, 4)], ids=["task", "layer"])
@pytest.mark.parametrize("copy_bytes", [None, 0, 6000])
@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradient_are_those_of_the_plain_formula(
    form: str, psi_shape: tuple[int, ...], copy_bytes: int | None, autocast: bool, fresh_seed: int
):
    history, current, layers = chain_of_rows()
    while form == "l1" and has_a_kink(history, current):
        history, current, layers = chain_of_rows()
    psi = torch.rand(psi_shape) * 2 - 0.3
    matrices = list(current.values())
    expected = plain(history, current, psi, form, layers)
    gradients = torch.autograd.grad(3.5 * expected, matrices, allow_unused=True)
    groups = group_history(history, current, copy_bytes)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = orthogonality_penalty(groups, current, psi, form, layers)
        loss = 3.5 * found  # lambda
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    for _ in range(2):  # as gradient accumulation does
        (loss / 2).backward(retain_graph=True)
    for matrix, gradient in zip(matrices, gradients, strict=True):
        if gradient is None:
            assert matrix.grad is None
        else:
            error = (matrix.grad - gradient).norm() / gradient.norm()
            assert matrix.grad.dtype == matrix.dtype and error < 1e-5


@pytest.mark.parametrize("copy_bytes", [None, 0])
def test_nearly_orthogonal_rows_keep_their_small_values(copy_bytes: int | None, fresh_seed: int):
    parts = [torch.randn(8, 64) for _ in range(4)]
    matrix = project_out(torch.randn(8, 64), parts) + 1e-4 * torch.randn(8, 64)
    history: Rows = {"m": list(enumerate(parts))}
    current = {"m": matrix.requires_grad_()}
    found = orthogonality_penalty(group_history(history, current, copy_bytes), current, torch.ones(4))
    expected = plain(history, current, torch.ones(4), "squared", {})
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    found.backward()
    (gradient,) = torch.autograd.grad(expected, [matrix])
    assert (matrix.grad - gradient).norm() / gradient.norm() < 1e-2


def test_psi_and_rows_in_place_are_read_in_each_call(fresh_seed: int):
    history, current, layers = chain_of_rows()
    psi = torch.rand(12)
    groups = group_history(history, current, copy_bytes=0)
    for _ in range(2):
        found = orthogonality_penalty(groups, current, psi)
        assert found.item() == pytest.approx(plain(history, current, psi, "squared", layers).item(), rel=1e-5)
        psi.mul_(0.5).add_(0.1)
        history["layers.0.proj"][1][1].mul_(3)


@pytest.mark.parametrize("copy_bytes", [None, 0])
def test_no_gradient_where_none_is_asked_for(copy_bytes: int | None):
    history, current, _ = chain_of_rows()
    groups = group_history(history, current, copy_bytes)
    expected = orthogonality_penalty(groups, current, torch.ones(12))
    with torch.no_grad():
        assert not orthogonality_penalty(groups, current, torch.ones(12)).requires_grad
    some = {name: matrix.detach() for name, matrix in current.items()}
    found = orthogonality_penalty(groups, some, torch.ones(12))
    assert not found.requires_grad and torch.equal(found, expected)
    chosen = some["layers.4.proj"].requires_grad_()
    found = orthogonality_penalty(groups, some, torch.ones(12))
    found.backward()
    assert all((matrix.grad is not None) == (matrix is chosen) for matrix in some.values())
    expected.backward()
    torch.testing.assert_close(chosen.grad, current["layers.4.proj"].grad)


def test_a_second_derivative_is_an_error():
    current = {"m": torch.randn(2, 8, requires_grad=True)}
    found = orthogonality_penalty(group_history({"m": [(0, torch.randn(2, 8))]}, current), current, torch.ones(1))
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(found, list(current.values()), create_graph=True)


def test_float32_under_autocast():
    """Products of many small numbers: bfloat16 would lose the third digit."""
    torch.manual_seed(3)
    history: Rows = {"m": [(0, torch.randn(4, 64))]}
    current = {"m": torch.randn(4, 64, requires_grad=True)}
    for copy_bytes in (None, 0):
        groups = group_history(history, current, copy_bytes)
        expected = orthogonality_penalty(groups, current, torch.ones(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = orthogonality_penalty(groups, current, torch.ones(1))
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_half_precision_matrices_are_multiplied_in_float32():
    current = {"m": torch.randn(2, 8).bfloat16().requires_grad_()}
    history: Rows = {"m": [(0, torch.randn(2, 8).half()), (1, torch.randn(1, 8))]}
    expected = plain(history, current, torch.ones(2), "squared", {})
    (gradient,) = torch.autograd.grad(expected, list(current.values()))
    for copy_bytes in (None, 0):
        current["m"].grad = None
        found = orthogonality_penalty(group_history(history, current, copy_bytes), current, torch.ones(2))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        found.backward()
        assert current["m"].grad.dtype == torch.bfloat16
        torch.testing.assert_close(current["m"].grad, gradient, rtol=1e-2, atol=1e-2)


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
