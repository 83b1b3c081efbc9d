"""Sums and truncations of low-rank products against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_aso.chain.lowrank import Product, distance, norm, padded, truncated, weighted_sum


def dense(product: Product) -> torch.Tensor:
    return product.up @ product.down


@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_against_dense(seed: int, inputs: int, outputs: int, ranks: list[int]) -> None:
    """Ranks above the sizes of the matrix are among the draws."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (
            torch.randn(rank, inputs, generator=generator),
            torch.randn(outputs, rank, generator=generator),
            1.5 * index - 1.0,
        )
        for index, rank in enumerate(ranks)
    ]
    expected = torch.stack([scale * up.double() @ down.double() for down, up, scale in parts]).sum(0)
    total = weighted_sum(parts)
    assert total.rank == sum(ranks)
    torch.testing.assert_close(dense(total), expected, rtol=1e-12, atol=1e-12)
    assert norm(total) == pytest.approx(float(torch.linalg.matrix_norm(expected)), rel=1e-10, abs=1e-12)
    values = torch.linalg.svdvals(expected)
    for rank in range(1, total.rank + 1):
        short = truncated(total, rank)
        bound = float(values[rank:].square().sum().sqrt())
        assert short.rank <= rank
        assert float(torch.linalg.matrix_norm(dense(short) - expected)) == pytest.approx(bound, abs=1e-10)
        assert distance(short, total) == pytest.approx(bound, abs=1e-10)
        longer = padded(short, total.rank + 2)
        assert longer.down.shape == (total.rank + 2, inputs)
        assert longer.up.shape == (outputs, total.rank + 2)
        assert torch.equal(dense(longer), dense(short)) or distance(longer, short) < 1e-12


def test_low_rank_is_left_as_it_is() -> None:
    product = weighted_sum([(torch.randn(2, 5), torch.randn(4, 2), 1.0)])
    assert truncated(product, 2) is product
    assert truncated(product, 7) is product


def test_zero_product() -> None:
    product = weighted_sum([(torch.randn(3, 5), torch.zeros(4, 3), 2.0)])
    assert norm(product) == 0.0
    assert torch.equal(dense(truncated(product, 1)), torch.zeros(4, 5).double())
