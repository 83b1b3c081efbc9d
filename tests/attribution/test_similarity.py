"""Spearman against scipy, and what a similarity does at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_aso.attribution import average_ranks, similarity

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12)
# few distinct values, so that ties are the rule
TIED = hnp.arrays(np.float32, SHAPES, elements=st.integers(-3, 3).map(float))
WIDE = hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**90), 2.0**90, width=32))


@settings(max_examples=60)
@given(values=st.one_of(TIED, WIDE))
def test_average_ranks_are_scipys(values: np.ndarray) -> None:
    expected = scipy.stats.rankdata(values, axis=-1)
    assert np.array_equal(average_ranks(torch.from_numpy(values)).numpy(), expected)


@settings(max_examples=60)
@given(data=st.data(), size=st.integers(2, 40), tied=st.booleans())
def test_spearman_is_scipys(data: st.DataObject, size: int, tied: bool) -> None:
    elements = st.integers(-2, 2).map(float) if tied else st.floats(-(2.0**60), 2.0**60, width=32)
    a = data.draw(hnp.arrays(np.float32, size, elements=elements))
    b = data.draw(hnp.arrays(np.float32, size, elements=elements))
    ours = float(similarity(torch.from_numpy(a), torch.from_numpy(b)))
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert ours == 0.0
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("method", ["pearson", "cosine"])
def test_pearson_and_cosine_are_scipys(method: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500)) + 3.0
    cosine = 1 - scipy.spatial.distance.cosine(a, b)
    expected = scipy.stats.pearsonr(a, b).statistic if method == "pearson" else cosine
    ours = similarity(torch.from_numpy(a), torch.from_numpy(b), method)
    assert float(ours) == pytest.approx(expected, abs=1e-12)


def test_many_ranks_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(352_256, generator=generator)
    b = a + torch.randn(352_256, generator=generator)
    expected = scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert float(similarity(a, b)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["spearman", "pearson", "cosine"])
def test_broadcasts_one_against_many(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    one, many = torch.randn(50, generator=generator), torch.randn(3, 4, 50, generator=generator)
    result = similarity(one, many, method)
    assert result.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert result[i, j] == similarity(one, many[i, j], method)


def test_one_against_many_is_ranked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["peft_aso.attribution.similarity"]
    shapes: list[torch.Size] = []
    original = module.average_ranks

    def counted(x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return original(x)

    monkeypatch.setattr(module, "average_ranks", counted)
    similarity(torch.randn(20), torch.randn(7, 20))
    assert shapes == [torch.Size([20]), torch.Size([7, 20])]


@pytest.mark.parametrize("method", ["spearman", "pearson"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -7e20])
def test_a_constant_vector_gives_zero(method: str, constant: float) -> None:
    other = torch.arange(33.0)
    assert float(similarity(torch.full((33,), constant), other, method)) == 0.0
    assert float(similarity(other, torch.full((33,), constant), method)) == 0.0


def test_a_zero_vector_has_no_direction() -> None:
    assert float(similarity(torch.zeros(4), torch.arange(4.0), "cosine")) == 0.0


@pytest.mark.parametrize("method", ["spearman", "pearson", "cosine"])
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_size_does_not_matter(method: str, scale: float) -> None:
    a = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    b = torch.tensor([0.3, -1.0, 4.0, 2.0], dtype=torch.float64)
    assert float(similarity(a * scale, b, method)) == pytest.approx(
        float(similarity(a, b, method)), abs=1e-12
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    x = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(ValueError, match="NaN or Inf"):
        similarity(x, torch.arange(3.0))
    with pytest.raises(ValueError, match="NaN or Inf"):
        similarity(torch.arange(3.0), x)


def test_wrong_shapes_and_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="same length"):
        similarity(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="do not broadcast"):
        similarity(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="empty"):
        similarity(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="method is one of"):
        similarity(torch.zeros(3), torch.zeros(3), "kendall")
