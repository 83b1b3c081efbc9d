"""The attribution vector: scores, layout, concatenation, and answers too unlikely for float32."""

from __future__ import annotations

import math

import pytest
import torch

from peft_aso.attribution import AttributionVector
from peft_aso.attribution.vector import assemble

LAYOUT = [("a.down", 0, 2), ("b.down", 2, 5)]


def vector(seed: int = 0, batch: int = 2, logs: float = -2.0) -> AttributionVector:
    generator = torch.Generator().manual_seed(seed)
    log = torch.full((batch,), logs)
    return AttributionVector(torch.randn(batch, 5, generator=generator), log, log.clone(), list(LAYOUT))


def test_scores_are_values_times_scale() -> None:
    v = vector()
    assert torch.allclose(v.scores, v.values * math.exp(-2.0))
    assert v.scores.dtype == torch.float32


def test_layers_and_slices() -> None:
    v = vector()
    assert torch.equal(v.layer("b.down"), v.values[:, 2:5])
    assert v.slices() == {"a.down": slice(0, 2), "b.down": slice(2, 5)}
    with pytest.raises(KeyError, match="c.down"):
        v.layer("c.down")


def test_check_layout_says_what_differs() -> None:
    v = vector()
    v.check_layout(vector(1))
    v.check_layout(LAYOUT)
    with pytest.raises(ValueError, match="2 layers here, 1 there"):
        v.check_layout([("a.down", 0, 5)])
    with pytest.raises(ValueError, match=r"'b.down' with 3 neurons here, 'x.down' with 3 there"):
        v.check_layout([("a.down", 0, 2), ("x.down", 2, 5)])
    with pytest.raises(ValueError, match="'a.down' with 2 neurons here, 'a.down' with 3 there"):
        v.check_layout([("a.down", 0, 3), ("b.down", 3, 5)])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([("a", 0, 2), ("b", 3, 5)], "contiguous"),
        ([("a", 0, 2)], "covers 2 neurons but values have 5"),
        ([("a", 0, 0), ("b", 0, 5)], "contiguous"),
    ],
)
def test_a_layout_must_fit(layout: list[tuple[str, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributionVector(torch.zeros(1, 5), torch.zeros(1), torch.zeros(1), layout)


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="log_scale must have shape"):
        AttributionVector(torch.zeros(2, 5), torch.zeros(2), torch.zeros(1), LAYOUT)
    with pytest.raises(ValueError, match="values must be"):
        AttributionVector(torch.zeros(5), torch.zeros(1), torch.zeros(1), LAYOUT)


def test_mean_vector_weighs_examples_by_their_size() -> None:
    v = vector(batch=3)
    v.log_scale = torch.tensor([-1.0, -2.0, -5.0])
    mean = v.mean_vector()
    # the mean of the scores, but for the factor exp(-1)
    assert torch.allclose(mean * math.exp(-1.0), v.scores.mean(0), atol=1e-7)


def test_mean_vector_survives_long_answers() -> None:
    v = vector(logs=-500.0)
    assert torch.all(v.scores == 0)
    assert torch.allclose(v.mean_vector(), v.values.mean(0))


def test_cat_and_to() -> None:
    a, b = vector(0, 2, -1.0), vector(1, 3, -2.0)
    both = AttributionVector.cat([a, b]).to("cpu")
    assert len(both) == 5
    assert torch.equal(both.values, torch.cat([a.values, b.values]))
    assert torch.equal(both.log_scale, torch.cat([a.log_scale, b.log_scale]))
    assert both.layout == LAYOUT
    with pytest.raises(ValueError, match="at least one"):
        AttributionVector.cat([])
    other = AttributionVector(torch.zeros(1, 5), torch.zeros(1), torch.zeros(1), [("z", 0, 5)])
    with pytest.raises(ValueError, match="different models"):
        AttributionVector.cat([a, other])


def test_assemble_raises_the_scale_only_where_float32_overflows() -> None:
    log_p = torch.tensor([-300.0, -300.0], dtype=torch.float64)
    calm = torch.tensor([[1.0, -2.0], [1.0, -2.0]], dtype=torch.float64)
    wild = torch.tensor([[3.0, 1e-3], [3.0, 1e-3]], dtype=torch.float64)
    # the second layer of example 1 finds the answer e^290 times likelier at some step
    sizes = [torch.tensor([-300.0, -300.0]).double(), torch.tensor([-300.0, -10.0]).double()]
    v = assemble([calm, wild], sizes, log_p, [("a", 0, 2), ("b", 2, 4)])
    assert torch.isfinite(v.values).all()
    assert v.log_scale[0] == -300.0
    assert torch.allclose(v.values[0], torch.tensor([1.0, -2.0, 3.0, 1e-3]))
    assert v.log_scale[1] > -300.0
    expected = torch.tensor([1.0, -2.0]).double() * torch.exp(torch.tensor(-300.0).double() - v.log_scale[1].double())
    assert torch.allclose(v.values[1, :2].double(), expected, rtol=1e-4, atol=1e-45)
    assert v.values[1, 2] / v.values[1, 3] == pytest.approx(3000.0, rel=1e-4)


def test_assemble_takes_a_layer_of_zeros() -> None:
    log_p = torch.tensor([-3.0], dtype=torch.float64)
    v = assemble([torch.zeros(1, 2).double()], [torch.tensor([500.0]).double()], log_p, [("a", 0, 2)])
    assert v.log_scale[0] == -3.0 and torch.all(v.values == 0)
