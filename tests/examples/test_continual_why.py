"""What is taken out of an adapter is gone, and what that changes is counted against the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def test_what_is_taken_out_counts_against_the_run(benchmark: Any) -> None:
    before, after = [True] * 4, [True, False, False, False]
    stages = [{"correct": {"a": {"generate": before}}}, {"correct": {name: {"generate": after} for name in "ab"}}]
    results = {"tasks": ["a", "b"], "stages": stages, "alone": None}
    row = benchmark("why").effect(results, "something", {name: {"generate": before} for name in "ab"})
    assert (row["a"], row["b"], row["AA, generate"], row["FM, generate"]) == (100, 100, 100, 0)
    change, low, high = row["change of FM, generate"]
    assert change == -75 and low < -75 < high <= 0
    assert stages[-1]["correct"]["a"]["generate"] == after  # the run itself is as it was


def test_shared_spans_and_energy(benchmark: Any) -> None:
    module = benchmark("why")
    a = torch.randn(6, 2).double()
    assert module.shared(a, a @ torch.randn(2, 2).double()) == pytest.approx(1)
    assert module.shared(torch.eye(6)[:, :2], torch.eye(6)[:, 2:4]) == pytest.approx(0)
    inputs, matrix = torch.randn(40, 6).double(), torch.randn(3, 6).double()
    expected = float((inputs @ matrix.T).pow(2).sum())
    assert module.energy(matrix, inputs.T @ inputs) == pytest.approx(expected)


def test_what_is_taken_out_is_gone(benchmark: Any) -> None:
    module = benchmark("why")
    inputs = torch.randn(200, 40).double() * torch.linspace(3, 0.1, 40)
    moment = inputs.T @ inputs
    leading = torch.linalg.eigh(moment).eigenvectors[:, -module.LEADING :].float()
    for title, change in module.CHANGES.items():
        layer = SimpleNamespace(
            lora_A={name: torch.nn.Linear(40, 2, bias=False) for name in ("old", "new")},
            lora_B={name: torch.nn.Linear(2, 12, bias=False) for name in ("old", "new")},
        )
        before = {
            name: [matrices[name].weight.clone() for matrices in vars(layer).values()] for name in ("old", "new")
        }
        change(layer, ["old"], "new", [moment])
        (a_old, b_old), (a, b) = ([each[name].weight for each in vars(layer).values()] for name in ("old", "new"))
        assert torch.equal(a_old, before["old"][0]) and torch.equal(b_old, before["old"][1])
        left = {
            "the rows of earlier A, from A": a @ a_old.T,
            f"{module.LEADING} leading directions of earlier inputs, from A": a @ leading,
            "the columns of earlier B, from B": b_old.T @ b,
        }
        assert title not in left or float(left[title].abs().max()) < 1e-6, title
        changed = [not torch.equal(*pair) for pair in zip((a, b), before["new"], strict=True)]
        assert changed == ["from A" in title, "from B" in title], title
