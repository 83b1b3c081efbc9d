"""Similarity against scipy, and what it does at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_aso.attribution import normalized, similarity, similarity_matrix

METHODS = ("spearman", "pearson", "cosine")
SCIPY = {
    "spearman": lambda x, y: scipy.stats.spearmanr(x, y).statistic,
    "pearson": lambda x, y: scipy.stats.pearsonr(x, y).statistic,
    "cosine": lambda x, y: 1 - scipy.spatial.distance.cosine(x, y),
}


@settings(max_examples=60)
@given(data=st.data(), size=st.integers(2, 40), tied=st.booleans())
def test_spearman_is_scipys(data: st.DataObject, size: int, tied: bool) -> None:
    elements = st.integers(-2, 2).map(float) if tied else st.floats(-(2.0**60), 2.0**60, width=32)
    a, b = (data.draw(hnp.arrays(np.float32, size, elements=elements)) for _ in range(2))
    ours = float(similarity(torch.from_numpy(a), torch.from_numpy(b)))
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert ours == 0.0
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_many_ranks_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(352_256, generator=generator)
    b = a + torch.randn(352_256, generator=generator)
    expected = scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert float(similarity(a, b)) == pytest.approx(expected, abs=1e-12)
    stored = (normalized(a).float() * normalized(b).float()).sum()
    assert float(stored) == pytest.approx(expected, abs=1e-6)


def draws(rows: int, size: int) -> torch.Tensor:
    """Rows of each kind: no ties, a few, many, constant; zeros of both signs among them."""
    kinds = [torch.randn(size), torch.randn(size).mul(size).round(), torch.randint(-2, 3, (size,)) * -1.0]
    kinds += [torch.full((size,), 0.1), torch.randn(size) * (torch.rand(size) < 0.5)]
    kinds += [torch.full((size,), -7e20), torch.zeros(size)]
    return torch.stack(kinds[:rows])


@pytest.mark.parametrize("method", METHODS)
def test_pairs_matrix_and_broadcast_are_scipys(method: str, fresh_seed: int) -> None:
    """A vector without order gives exactly 0."""
    a, b = draws(7, 3000), draws(4, 3000).flip(-1)
    found = similarity_matrix(a, b, method)
    for i, x in enumerate(a.double().numpy()):
        for j, y in enumerate(b.double().numpy()):
            flat = not x.any() if method == "cosine" else x.min() == x.max() or y.min() == y.max()
            assert found[i, j].item() == (0.0 if flat else pytest.approx(SCIPY[method](x, y), abs=1e-12))
    torch.testing.assert_close(similarity(a[:, None], b, method), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(similarity(a[:4], b, method), found.diagonal(), rtol=0, atol=1e-12)
    torch.testing.assert_close(similarity_matrix(a, a.clone(), method), similarity_matrix(a, method=method))
    torch.testing.assert_close(normalized(a, method) @ normalized(b, method).T, found, rtol=0, atol=1e-12)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_each_dtype(dtype: torch.dtype, fresh_seed: int) -> None:
    x = (draws(2, 2000).clamp(-3, 3) + 3).mul(40).to(dtype)[:, ::2]
    expected = scipy.stats.spearmanr(*x.double().numpy()).statistic
    assert float(similarity(x[0], x[1])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_size_does_not_matter(method: str, scale: float) -> None:
    a = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    b = torch.tensor([0.3, -1.0, 4.0, 2.0], dtype=torch.float64)
    assert float(similarity(a * scale, b, method)) == pytest.approx(float(similarity(a, b, method)), abs=1e-12)


NAN, INF = torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([1.0, -float("inf"), 2.0])


@pytest.mark.parametrize(
    ("a", "b", "method", "message"),
    [
        (NAN, torch.arange(3.0), "spearman", "NaN or Inf"),
        (torch.arange(3.0), INF, "cosine", "NaN or Inf"),
        (torch.zeros(3), torch.zeros(4), "spearman", "same length"),
        (torch.zeros(0), torch.zeros(0), "spearman", "empty"),
        (torch.zeros(3), torch.zeros(3), "kendall", "kendall"),
    ],
)
def test_wrong_vectors_and_methods_are_refused(a: torch.Tensor, b: torch.Tensor, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity(a, b, method)
    with pytest.raises(ValueError, match=message):
        similarity_matrix(a[None], b[None], method)
    with pytest.raises(ValueError, match=r"compares \(S, N\) with \(T, N\)"):
        similarity_matrix(a, b, method)
