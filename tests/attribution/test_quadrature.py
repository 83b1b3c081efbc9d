"""Nodes, weights and adaptive refinement: on functions whose integral is known, and on models, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from captum.attr._utils.approximation_methods import approximation_parameters
from torch import nn

from peft_aso.attribution import AttributionConfig, attribute, find_neurons, integrated_gradients
from peft_aso.attribution.integrated_gradients import weighted_sum
from peft_aso.attribution.quadrature import Gradients, Samples, nodes_and_weights, refine
from tests.attribution.reference import answer_probability, largest_gap, scaled_positions
from tests.tiny_models import tiny, tiny_batch


def test_riemann_is_the_papers_and_captums_right_sum() -> None:
    nodes, weights = nodes_and_weights(AttributionConfig(steps=20, quadrature="riemann"))
    assert nodes.tolist() == pytest.approx([k / 20 for k in range(1, 21)])
    assert weights.tolist() == pytest.approx([1 / 20] * 20)
    sizes, alphas = approximation_parameters("riemann_right")
    assert alphas(20) == pytest.approx(nodes.tolist()) and sizes(20) == pytest.approx(weights.tolist())


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_gauss_legendre_integrates_polynomials_exactly(steps: int) -> None:
    nodes, weights = nodes_and_weights(AttributionConfig(steps=steps, quadrature="gauss_legendre"))
    for degree in range(2 * steps):
        assert float((weights * nodes**degree).sum()) == pytest.approx(1 / (degree + 1), abs=1e-12)


def refined(gradients: Gradients, tolerance: float, most: int = 80) -> tuple[list[float], float]:
    """The nodes of the only example, and its score."""
    (first,) = gradients(torch.tensor([0]), torch.tensor([[0.0, 0.5, 1.0]]))
    samples, weights = refine(gradients, first, tolerance, most)
    scores = weighted_sum(samples, weights)
    return sorted(samples.nodes.tolist()), float(scores.values[0, 0] * scores.log_scale[0].exp())


def test_a_jump_is_divided_but_not_for_ever() -> None:
    def gradients(examples: torch.Tensor, nodes: torch.Tensor) -> list[Samples]:
        log_p = torch.where(nodes.flatten() > 0.3, 0.9, 0.1).double().log()
        flat = examples.repeat_interleave(nodes.shape[1])
        return [Samples(flat, nodes.flatten(), log_p, torch.zeros(nodes.numel(), 2))]

    assert refined(gradients, tolerance=1.0)[0] == [0.0, 0.5, 1.0]
    nodes, score = refined(gradients, tolerance=0.1)
    assert len(nodes) < 20 and score == 0.0
    assert len(refined(gradients, tolerance=1e-4, most=10)[0]) <= 10


def at_node(model: nn.Module, batch: Any, name: str, node: float) -> tuple[float, torch.Tensor]:
    """P of the one example with the neurons of `name` scaled by `node`, and neuron * dP/dneuron there, `(size,)`."""
    where = scaled_positions(model, batch, name)
    found: list[torch.Tensor] = []

    def scale(_: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        own = args[0].detach().view(*where.shape[:2], -1)
        leaf = (own * node).requires_grad_()
        found.extend([own, leaf])
        return torch.where(where, leaf, own).view_as(args[0])

    with model.get_submodule(name).register_forward_pre_hook(scale):
        p = answer_probability(model, batch)
    own, leaf = found
    (gradient,) = torch.autograd.grad(p.sum(), leaf)
    return float(p.detach()), (own * gradient * where).sum((0, 1)).double()


def by_hand(model: nn.Module, batch: Any, name: str, tolerance: float) -> torch.Tensor:
    """The scores of one layer: every interval that misses is halved, or quartered if it misses by two tolerances."""
    known = {node: at_node(model, batch, name, node) for node in (0.0, 0.5, 1.0)}
    while True:
        largest = max(p for p, _ in known.values())
        pairs = list(zip(sorted(known), sorted(known)[1:], strict=False))
        wrong = []
        for a, b in pairs:
            trapezoid = (b - a) * float((known[a][1] + known[b][1]).sum()) / 2
            missed = abs(trapezoid - (known[b][0] - known[a][0])) / largest
            if b - a > tolerance / 16 and missed > tolerance:
                wrong += [a + (b - a) * part / 4 for part in ((1, 2, 3) if missed > 2 * tolerance else (2,))]
        if not wrong:
            return sum((b - a) * (known[a][1] + known[b][1]) / 2 for a, b in pairs)
        known |= {node: at_node(model, batch, name, node) for node in wrong}


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_adaptive_is_as_by_hand(name: str, fresh_seed: int) -> None:
    model = tiny(name, std=0.4, seed=fresh_seed).double()  # in float32 a node more or less is a matter of rounding
    batch = tiny_batch(model, 1, seed=fresh_seed)
    config = AttributionConfig(steps=50)
    expected = torch.cat([by_hand(model, batch, layer.name, 1 / 50) for layer in find_neurons(model)])[None]
    for found in (attribute(model, batch, config), integrated_gradients(model, batch, config)):
        assert largest_gap(found.scores.double(), expected) <= 1e-4


def test_adaptive_nodes_are_where_they_are_needed() -> None:
    model = tiny("llama", std=0.6)
    batch = tiny_batch(model, 4)
    exact = attribute(model, batch, AttributionConfig(steps=4000, quadrature="riemann")).values
    adaptive = attribute(model, batch, AttributionConfig(steps=20))
    assert adaptive.nodes is not None and 3 < adaptive.nodes < 10
    for rule in ("riemann", "gauss_legendre"):
        even = attribute(model, batch, AttributionConfig(steps=math.ceil(adaptive.nodes), quadrature=rule)).values
        assert (adaptive.values - exact).norm() < 0.5 * (even - exact).norm()
