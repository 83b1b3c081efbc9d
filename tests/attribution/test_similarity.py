"""Spearman against scipy, and what a similarity does at the edges."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_aso.attribution import average_ranks, prepare, similarity, similarity_matrix

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
            assert result[i, j].item() == pytest.approx(similarity(one, many[i, j], method).item(), abs=1e-15)


def test_each_vector_is_ranked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("peft_aso.attribution.similarity")
    shapes: list[tuple[int, ...]] = []
    original = module._doubled_ranks
    monkeypatch.setattr(module, "_doubled_ranks", lambda x: shapes.append(tuple(x.shape)) or original(x))
    similarity(torch.randn(20), torch.randn(7, 20))
    assert shapes == [(20,), (7, 20)]
    similarity_matrix(torch.randn(5, 20))
    similarity_matrix(torch.randn(5, 20), torch.randn(2, 20))
    assert shapes[2:] == [(5, 20), (5, 20), (2, 20)]
    many, one = prepare(torch.randn(4, 20)), prepare(torch.randn(20))
    similarity(many, one), similarity(one, many), similarity_matrix(many)
    assert shapes[5:] == [(4, 20), (20,)]


def draws(rows: int, size: int) -> torch.Tensor:
    """Rows of each kind: no ties, a few, many, constant; zeros of both signs among them."""
    kinds = [torch.randn(size), torch.randn(size).mul(size).round(), torch.randint(-2, 3, (size,)) * -1.0]
    kinds += [torch.full((size,), 0.3), torch.randn(size) * (torch.rand(size) < 0.5)]
    return torch.stack([kinds[index % len(kinds)] for index in range(rows)])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_ranks_of_each_dtype(dtype: torch.dtype, threads: int, fresh_seed: int) -> None:
    torch.set_num_threads(threads)
    x = (draws(6, 12_000).clamp(-3, 3) + 3).mul(40).to(dtype)
    expected = scipy.stats.rankdata(x.double().numpy(), axis=-1)
    assert np.array_equal(average_ranks(x).numpy(), expected)
    assert np.array_equal(average_ranks(x[:, ::3]).numpy(), scipy.stats.rankdata(x[:, ::3].double().numpy(), axis=-1))


def test_the_way_of_other_devices_gives_the_same_ranks(fresh_seed: int) -> None:
    module = importlib.import_module("peft_aso.attribution.similarity")
    for x in (draws(5, 400), torch.randn(3, 400)):
        assert torch.equal(module._ranks_by_torch(x).float(), module._doubled_ranks(x))


def test_ranks_beyond_float32_are_float64(monkeypatch: pytest.MonkeyPatch, fresh_seed: int) -> None:
    module = importlib.import_module("peft_aso.attribution.similarity")
    x = draws(4, 90)
    expected = similarity_matrix(x)
    monkeypatch.setattr(module, "_FLOAT32_RANKS", 50)
    assert prepare(x).rows.dtype == torch.float64
    torch.testing.assert_close(similarity_matrix(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["spearman", "pearson", "cosine"])
def test_the_matrix_is_that_of_each_pair(method: str, fresh_seed: int) -> None:
    a, b = draws(6, 3000), draws(4, 3000).flip(-1)
    found = similarity_matrix(a, b, method)
    plain = {
        "spearman": lambda x, y: scipy.stats.spearmanr(x, y).statistic,
        "pearson": lambda x, y: scipy.stats.pearsonr(x, y).statistic,
        "cosine": lambda x, y: 1 - scipy.spatial.distance.cosine(x, y),
    }[method]
    for i, x in enumerate(a.double().numpy()):
        for j, y in enumerate(b.double().numpy()):
            constant = method != "cosine" and (x.min() == x.max() or y.min() == y.max())
            assert found[i, j].item() == pytest.approx(0.0 if constant else plain(x, y), abs=1e-12)
    torch.testing.assert_close(similarity(a[:, None], b, method), found, rtol=0, atol=1e-14)
    torch.testing.assert_close(similarity(a[:4], b, method), found.diagonal(), rtol=0, atol=1e-14)
    torch.testing.assert_close(similarity_matrix(a, a.clone(), method), similarity_matrix(a, method=method))


@pytest.mark.parametrize("method", ["spearman", "pearson", "cosine"])
def test_vectors_kept_in_float32(method: str, fresh_seed: int) -> None:
    x = draws(5, 20_000) + 0.1
    kept = prepare(x, method, torch.float32)
    assert kept.rows.dtype == torch.float32 and kept.scale.dtype == torch.float64
    error = (similarity_matrix(kept, method=method) - similarity_matrix(x, method=method)).abs().max()
    assert error <= (0.0 if method == "spearman" else 2e-7)


def test_prepared_vectors_know_their_method() -> None:
    with pytest.raises(ValueError, match="`b` was prepared for pearson: prepare it for spearman"):
        similarity(torch.randn(3), prepare(torch.randn(3), "pearson"))
    with pytest.raises(ValueError, match=r"compares \(S, N\) with \(T, N\)"):
        similarity_matrix(torch.randn(3), torch.randn(2, 3))


def test_no_vectors_at_all() -> None:
    assert similarity_matrix(torch.zeros(0, 4), torch.randn(3, 4)).shape == (0, 3)
    assert similarity(torch.zeros(0, 4), torch.randn(4)).shape == (0,)


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
    assert float(similarity(a * scale, b, method)) == pytest.approx(float(similarity(a, b, method)), abs=1e-12)


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
