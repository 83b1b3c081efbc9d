"""Nodes and weights of the path from zero to the neurons."""

from __future__ import annotations

import pytest
import torch

from peft_aso.attribution.quadrature import path


def test_riemann_is_the_papers_right_sum() -> None:
    rule = path(20)
    nodes, weights = rule.nodes, rule.weights
    assert nodes.tolist() == pytest.approx([k / 20 for k in range(1, 21)])
    assert weights.tolist() == pytest.approx([1 / 20] * 20)
    assert nodes[-1] == 1.0


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_gauss_legendre_integrates_polynomials_exactly(steps: int) -> None:
    rule = path(steps, "gauss_legendre")
    nodes, weights = rule.nodes, rule.weights
    assert torch.all((nodes > 0) & (nodes < 1))
    for degree in range(2 * steps):
        assert float((weights * nodes**degree).sum()) == pytest.approx(1 / (degree + 1), abs=1e-12)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "20"])
def test_steps_are_counted(steps: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        path(steps)  # type: ignore[arg-type]


def test_other_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="riemann, gauss_legendre"):
        path(3, "simpson")
