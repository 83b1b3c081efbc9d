"""The attribution vector: scores, layout, concatenation, and answers too unlikely for float32."""

from __future__ import annotations

import math

import pytest
import torch

from peft_aso.attribution import AttributionVector
from peft_aso.attribution.vector import LayerScores, assemble

LAYOUT = [("a.down", 0, 2), ("b.down", 2, 5)]


def vector(seed: int = 0, batch: int = 2, logs: float = -2.0) -> AttributionVector:
    generator = torch.Generator().manual_seed(seed)
    log = torch.full((batch,), logs)
    return AttributionVector(torch.randn(batch, 5, generator=generator), log, log.clone(), list(LAYOUT), nodes=3.0)


def test_scores_and_layers() -> None:
    v = vector()
    assert torch.allclose(v.scores, v.values * math.exp(-2.0)) and v.scores.dtype == torch.float32
    assert torch.equal(v.layer("b.down"), v.values[:, 2:5])
    with pytest.raises(KeyError, match="c.down"):
        v.layer("c.down")


def test_the_mean_weighs_examples_by_their_size_and_survives_long_answers() -> None:
    v = vector(batch=3)
    v.log_scale = torch.tensor([-1.0, -2.0, -5.0])
    assert torch.allclose(v.mean_vector() * math.exp(-1.0), v.scores.mean(0), atol=1e-7)
    long = vector(logs=-500.0)
    assert torch.all(long.scores == 0)
    assert torch.allclose(long.mean_vector(), long.values.mean(0))


def test_cat_and_to() -> None:
    a, b = vector(0, 2, -1.0), vector(1, 3, -2.0)
    b.nodes = 8.0
    both = AttributionVector.cat([a, b])
    assert len(both) == 5 and both.layout == LAYOUT and both.nodes == 6.0
    assert torch.equal(both.values, torch.cat([a.values, b.values]))
    assert torch.equal(both.log_scale, torch.cat([a.log_scale, b.log_scale]))
    with pytest.raises(ValueError, match="at least one"):
        AttributionVector.cat([])
    other = AttributionVector(torch.zeros(1, 5), torch.zeros(1), torch.zeros(1), [("z", 0, 5)])
    with pytest.raises(ValueError, match="different models"):
        AttributionVector.cat([a, other])


def scores(values: list[list[float]], log_scale: list[float]) -> LayerScores:
    return LayerScores(torch.tensor(values).double(), torch.tensor(log_scale).double(), 1.0)


def test_the_scale_is_raised_only_where_float32_would_overflow() -> None:
    log_p = torch.tensor([-300.0, -300.0]).double()
    # the second layer of example 1 finds the answer e^290 times likelier at some step
    calm, wild = scores([[1.0, -2.0]] * 2, [-300.0, -300.0]), scores([[3.0, 1e-3]] * 2, [-300.0, -10.0])
    v = assemble({"a": calm, "b": wild}, log_p)
    assert v.layout == [("a", 0, 2), ("b", 2, 4)] and torch.isfinite(v.values).all()
    assert v.log_scale[0] == -300.0 and v.log_scale[1] > -300.0
    assert torch.allclose(v.values[0], torch.tensor([1.0, -2.0, 3.0, 1e-3]))
    expected = torch.tensor([1.0, -2.0]).double() * torch.exp(-300.0 - v.log_scale[1].double())
    assert torch.allclose(v.values[1, :2].double(), expected, rtol=1e-4, atol=1e-45)
    assert v.values[1, 2] / v.values[1, 3] == pytest.approx(3000.0, rel=1e-4)

    zeros = assemble({"a": scores([[0.0, 0.0]], [500.0])}, torch.tensor([-3.0]).double())
    assert zeros.log_scale[0] == -3.0 and torch.all(zeros.values == 0)
