"""Prefixes that are read by many rows: shared or copied, against attention over repeated keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from peft_aso.attribution.shared_attention import (
    Rows,
    SharingUnsupported,
    prefix_cache,
    shared_prefix_attention,
    shared_prefixes,
)
from tests.tiny_models import tiny

ROWS = Rows(torch.tensor([0, 2]), of_batch=3, nodes=3)


def filled(dtype: torch.dtype = torch.float32) -> DynamicCache:
    cache = DynamicCache()
    cache.update(*torch.randn(2, 3, 2, 5, 4, dtype=dtype), 0)
    return cache


def test_a_running_state_is_no_prefix() -> None:
    with pytest.raises(TypeError, match="running state"):
        prefix_cache(Cache(layers=[object()]), ROWS, shared=True)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sharing_and_its_gradient_are_those_of_copies(
    cross: bool, biased: bool, dtype: torch.dtype, fresh_seed: int
) -> None:
    """Two heads a key, two new positions; against the softmax over repeated keys and values."""
    cache, width, rows = filled(dtype), 2, [0, 0, 0, 2, 2, 2]
    pk, pv = cache.layers[0].keys[rows], cache.layers[0].values[rows]
    q = torch.randn(6, 4, width, 4, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(6, 2, width, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    keys, values = (pk, pv) if cross else (torch.cat([pk, k], 2), torch.cat([pv, v], 2))
    mask = torch.randn(3, 1, width, keys.shape[2])[rows]
    mask[:3, ..., 0] = torch.finfo(torch.float32).min  # padding
    bias = torch.randn(1, 4, width, keys.shape[2]) if biased else None
    view = prefix_cache(cache, ROWS, shared=True).layers[0]
    with shared_prefixes(tiny("llama")):
        shown = (view.keys, view.values) if cross else view.update(k, v)
        out, _ = shared_prefix_attention(nn.Module(), q, *shown, mask, position_bias=bias)
    scores = q @ keys.repeat_interleave(2, 1).mT / 2 + mask + (0 if bias is None else bias)
    expected = (scores.softmax(-1).to(dtype) @ values.repeat_interleave(2, 1)).transpose(1, 2)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    assert torch.allclose(out, expected, atol=tolerance)
    leaves, weight = [q] if cross else [q, k, v], torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), leaves) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=10 * tolerance)


@pytest.mark.parametrize("odd", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}, None])
def test_unknown_terms_and_a_prefix_that_no_attention_takes_are_refused(odd: dict[str, Any] | None) -> None:
    model, new = tiny("llama"), torch.randn(6, 2, 1, 4)
    own = model.config._attn_implementation
    with pytest.raises(SharingUnsupported, match="softcap" if odd else "registry"), shared_prefixes(model):
        assert model.model.layers[0].self_attn.config._attn_implementation != own
        prefix_cache(filled(), ROWS, shared=True).update(new, new, 0)
        if odd is not None:
            shared_prefix_attention(nn.Module(), new, new, new, None, **odd)
    assert model.config._attn_implementation == own
