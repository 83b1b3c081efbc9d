"""Trapezoids that are halved where they do not add up."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from peft_aso.attribution import find_neurons, integrated_gradients
from peft_aso.attribution.adaptive import _Known
from peft_aso.attribution.steps import Gradients
from tests.attribution.reference import answer_probability, largest_gap, scaled_positions
from tests.tiny_models import tiny, tiny_batch

Batch = dict[str, torch.Tensor]
ADAPTIVE = sys.modules["peft_aso.attribution.adaptive"]


def at(model: nn.Module, batch: Batch, name: str, node: float) -> tuple[float, torch.Tensor]:
    """P of the one example with the neurons of `name` scaled by `node`, and neuron * dP/dneuron there, `(size,)`."""
    where = scaled_positions(model, batch, name)[..., None]
    kept: list[torch.Tensor] = []

    def scale(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        own = args[0].detach().view(*where.shape[:2], -1)
        leaf = (own * node).requires_grad_()
        kept.extend([own, leaf])
        return (torch.where(where, leaf, own).view_as(args[0]),)

    hook = model.get_submodule(name).register_forward_pre_hook(scale)
    try:
        p = answer_probability(model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
    finally:
        hook.remove()
    own, leaf = kept
    (gradient,) = torch.autograd.grad(p.sum(), leaf)
    return float(p.detach()), (own * gradient * where).sum((0, 1)).double()


def by_hand(model: nn.Module, batch: Batch, name: str, tolerance: float) -> torch.Tensor:
    """The scores of one layer: every interval that misses is halved, or quartered if it misses by two tolerances."""
    known = {node: at(model, batch, name, node) for node in (0.0, 0.5, 1.0)}
    while True:
        largest = max(p for p, _ in known.values())
        places = sorted(known)
        wrong = []
        for a, b in zip(places, places[1:], strict=False):
            trapezoid = (b - a) * float((known[a][1] + known[b][1]).sum()) / 2
            missed = abs(trapezoid - (known[b][0] - known[a][0])) / largest
            if b - a > tolerance / 16 and missed > tolerance:
                wrong += [a + (b - a) * part / 4 for part in ((1, 2, 3) if missed > 2 * tolerance else (2,))]
        if not wrong:
            return sum((b - a) * (known[a][1] + known[b][1]) / 2 for a, b in zip(places, places[1:], strict=False))
        known |= {node: at(model, batch, name, node) for node in wrong}


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_one_example_is_done_as_by_hand(name: str, fresh_seed: int) -> None:
    model = tiny(name, std=0.4, seed=fresh_seed).double()  # in float32 a node more or less is a matter of rounding
    batch = tiny_batch(model, 1, seed=fresh_seed)
    found = integrated_gradients(model, batch, steps=50, quadrature="adaptive")
    expected = torch.cat([by_hand(model, batch, layer.name, 1 / 50) for layer in find_neurons(model)])
    assert largest_gap(found.scores.double(), expected[None]) <= 1e-4


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5", "bert", "llama_classifier"])
def test_fast_is_plain(name: str, padding: str, fresh_seed: int) -> None:
    model = tiny(name, std=0.3, seed=fresh_seed)
    batch = tiny_batch(model, 5, seed=fresh_seed, padding=padding, prompt=(1, 9))
    settings: dict[str, Any] = {"steps": 40, "quadrature": "adaptive"}
    fast = integrated_gradients(model, batch, method="fast", **settings)
    plain = integrated_gradients(model, batch, method="plain", **settings)
    few = integrated_gradients(model, batch, method="fast", max_rows=4, **settings)
    assert largest_gap(fast.values, plain.values) <= 1e-4
    assert largest_gap(few.values, plain.values) <= 1e-4


def count_nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many nodes every later refinement runs, in a list that grows."""
    counts: list[int] = []
    original = ADAPTIVE.layer_gradients

    def counted(*args: Any) -> Gradients:
        found = original(*args)
        counts.append(found.nodes.numel())
        return found

    monkeypatch.setattr(ADAPTIVE, "layer_gradients", counted)
    return counts


def test_as_many_nodes_come_nearer_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", std=0.6)
    batch = tiny_batch(model, 4)
    reference = integrated_gradients(model, batch, steps=4000).values
    counts = count_nodes(monkeypatch)
    found = integrated_gradients(model, batch, steps=20, quadrature="adaptive").values
    nodes = 3 + sum(counts) / (4 * len(find_neurons(model)))
    assert 3 < nodes < 10
    for rule in ("riemann", "gauss_legendre"):
        even = integrated_gradients(model, batch, steps=math.ceil(nodes), quadrature=rule).values
        assert (found - reference).norm() < 0.5 * (even - reference).norm()


def test_a_smaller_tolerance_comes_nearer(fresh_seed: int) -> None:
    """Of nearly all examples: a bump of P that lies wholly between two nodes is not seen."""
    model = tiny("llama", std=0.4, seed=fresh_seed)
    batch = tiny_batch(model, 12, seed=fresh_seed)
    exact = integrated_gradients(model, batch, steps=400, quadrature="gauss_legendre").scores
    fine = integrated_gradients(model, batch, steps=20_000, quadrature="adaptive").scores
    near = [largest_gap(fine[row : row + 1], exact[row : row + 1]) <= 0.02 for row in range(12)]
    assert sum(near) >= 9


def known(nodes: list[list[float]], p: list[list[float]], slopes: list[list[float]]) -> _Known:
    """Two neurons, of which the second does nothing."""
    p_of = torch.tensor(p, dtype=torch.float64)
    of_log = torch.tensor(slopes, dtype=torch.float64) / p_of
    values = torch.stack([of_log, torch.zeros_like(of_log)], -1)
    return _Known(Gradients(torch.arange(len(p)), torch.tensor(nodes, dtype=torch.float64), p_of.log(), values))


def test_where_it_adds_up_nothing_is_asked() -> None:
    straight = known([[0, 0.5, 1]], [[0.1, 0.3, 0.5]], [[0.4, 0.4, 0.4]])
    assert not len(straight.wanted(0.01, 80)[0])
    scores = straight.trapezoids()
    assert (scores.values * scores.log_size.exp()).tolist() == [pytest.approx([0.4, 0.0])]


def test_intervals_that_miss_are_divided() -> None:
    jump, straight = [0.1, 0.9, 0.9], [0.1, 0.3, 0.5]
    found = known([[0, 0.5, 1]] * 3, [jump, straight, [0.1, 0.16, 0.16]], [[0, 0, 0], [0.4] * 3, [0, 0, 0]])
    examples, nodes = found.wanted(0.25, 80)
    assert examples.tolist() == [0, 2] and nodes.tolist() == [[0.125, 0.25, 0.375], [0.25, 0.25, 0.25]]
    both = known([[0, 0.5, 1]], [[0.1, 0.5, 0.9]], [[0, 0, 0]])
    assert sorted(both.wanted(0.3, 80)[1][0].tolist()) == [0.25, 0.75]
    found.add(Gradients(examples, nodes, torch.full_like(nodes, 0.9).log(), torch.zeros(2, 3, 2)))
    assert found.trapezoids().values.shape == (3, 2)


def test_a_node_that_is_there_twice_counts_once() -> None:
    once = known([[0, 0.5, 1]], [[0.1, 0.3, 0.5]], [[0.4, 0.6, 0.4]]).trapezoids()
    twice = known([[0, 0.5, 0.5, 0.5, 1]], [[0.1, 0.3, 0.3, 0.3, 0.5]], [[0.4, 0.6, 0.6, 0.6, 0.4]]).trapezoids()
    torch.testing.assert_close(once.values, twice.values, rtol=1e-12, atol=0)


def test_the_tolerance_is_a_part_of_the_largest_p() -> None:
    tiny_p = known([[0, 0.5, 1]], [[1e-30, 9e-30, 9e-30]], [[0, 0, 0]])
    assert tiny_p.wanted(0.5, 80)[1].tolist() == [[0.25]]


def jump_at(where: float, found: _Known, tolerance: float, most: int) -> int:
    """Let `found` ask until it is satisfied; P is 0.1 below `where` and 0.9 above. How many rounds it took."""
    rounds = 0
    while len(found.wanted(tolerance, most)[0]):
        examples, nodes = found.wanted(tolerance, most)
        after = torch.where(nodes > where, 0.9, 0.1).double()
        found.add(Gradients(examples, nodes, after.log(), torch.zeros(*nodes.shape, 2)))
        rounds += 1
    return rounds


def test_a_step_is_not_divided_for_ever() -> None:
    found = known([[0, 0.5, 1]], [[0.1, 0.9, 0.9]], [[0, 0, 0]])
    rounds = jump_at(0.3, found, tolerance=0.1, most=80)
    left, right = found.intervals()
    assert rounds == 4 and float((found.nodes[right] - found.nodes[left]).min()) == 0.5 * 4**-4


def test_there_are_no_more_nodes_than_the_most() -> None:
    found = known([[0, 0.5, 1]] * 2, [[0.1, 0.9, 0.9], [0.1, 0.9, 0.1]], [[0, 0, 0]] * 2)
    jump_at(0.3, found, tolerance=0.01, most=10)
    assert found.examples.bincount().tolist() == [9, 9]  # three at a time
