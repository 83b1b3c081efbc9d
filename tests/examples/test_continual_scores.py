"""The four numbers and their intervals, what wrong answers are, and where forgetting comes from, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def test_metrics_and_intervals_by_hand(benchmark: Any) -> None:
    scores = benchmark("scores")
    stages = [
        {"a": {"generate": [True, True, True, False]}},
        {"a": {"generate": [True, False, False, False]}, "b": {"generate": [True, True]}},
    ]
    alone = {"a": {"generate": [True] * 4}, "b": {"generate": [True, False]}}
    found = scores.summary(["a", "b"], stages, alone)["generate"]
    assert found["matrix"] == [[75.0, None], [25.0, 100.0]] and found["alone"] == [100.0, 50.0]
    assert (found["AA"], found["FM"], found["BWT"], found["FWT"]) == (62.5, 50.0, -50.0, 50.0)
    low, high = found["95%"]["AA"]
    assert 50 <= low < 62.5 < high <= 100
    run = {"tasks": ["a", "b"], "stages": [{"correct": each} for each in stages], "alone": alone}
    assert scores.difference(run, run, "generate") == (0.0, [0.0, 0.0])
    other = {**run, "stages": [{"correct": {"a": {"generate": [True, True, False, False]}}}, {"correct": stages[1]}]}
    assert scores.difference(run, other, "generate", after=1)[0] == 25.0
    assert scores.difference(run, other, "generate", "FM")[0] == 25.0
    better = [stages[0], {**stages[1], "a": {"generate": [True, True, False, False]}}]
    pair = {**run, "stages": [{"correct": e} for e in better]}, run
    gap, (low, high) = scores.difference(*pair, "generate")
    assert gap == 12.5 and 0 <= low < 12.5 < high
    mean, interval = scores.mean_difference([pair, (run, run)], "generate")
    assert mean == 6.25 and interval == [low / 2, high / 2]
    with pytest.raises(ValueError, match="not tested on the same examples"):
        scores.mean_difference([(run, run), (other, {**run, "stages": run["stages"][:1]})], "generate")


def test_shared_spans_and_energy(benchmark: Any) -> None:
    why = benchmark("why")
    a = torch.randn(6, 2).double()
    assert why.shared(a, a @ torch.randn(2, 2).double()) == pytest.approx(1)
    assert why.shared(torch.eye(6)[:, :2], torch.eye(6)[:, 2:4]) == pytest.approx(0)
    inputs, matrix = torch.randn(40, 6).double(), torch.randn(3, 6).double()
    assert why.energy(matrix, inputs.T @ inputs) == pytest.approx(float((inputs @ matrix.T).pow(2).sum()))


def test_what_is_taken_out_of_an_adapter_is_gone(benchmark: Any) -> None:
    why = benchmark("why")
    inputs = torch.randn(200, 40).double() * torch.linspace(3, 0.1, 40)
    moment = inputs.T @ inputs
    leading = torch.linalg.eigh(moment).eigenvectors[:, -why.LEADING :].float()
    for title, change in why.CHANGES.items():
        A = {name: torch.nn.Linear(40, 2, bias=False) for name in ("old", "new")}
        B = {name: torch.nn.Linear(2, 12, bias=False) for name in ("old", "new")}
        weights = [part[name].weight for name in ("old", "new") for part in (A, B)]
        before = [weight.clone() for weight in weights]
        change(SimpleNamespace(lora_A=A, lora_B=B), ["old"], "new", [moment])
        after = [part[name].weight for name in ("old", "new") for part in (A, B)]
        changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert changed == [False, False, "from A" in title, "from B" in title], title
        left = {
            "the rows of earlier A, from A": after[2] @ after[0].T,
            f"{why.LEADING} leading directions of earlier inputs, from A": after[2] @ leading,
            "the columns of earlier B, from B": after[1].T @ after[3],
        }
        assert title not in left or float(left[title].abs().max()) < 1e-6, title
