"""What all prompts of a task begin with, the instruction and the options, run once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

# not worth a pass of its own below
WORTHWHILE = 8


def common(rows: Sequence[Sequence[int]], limit: int) -> int:
    """How many tokens, at most `limit`, all rows begin with; 0 where that is too few to be worth it."""
    first, length = rows[0], 0
    longest = min(limit, *(len(row) for row in rows))
    while length < longest and all(row[length] == first[length] for row in rows):
        length += 1
    return length if length >= WORTHWHILE else 0


def cache_of(model: Any, ids: Sequence[int]) -> DynamicCache | None:
    """The keys and values of these tokens, one row; None where the model keeps something else."""
    given = torch.tensor([list(ids)], device=model.device)
    cache = model(input_ids=given, use_cache=True).past_key_values
    return cache if is_plain(cache) else None


def is_plain(cache: Any) -> bool:
    """Whether the cache is keys and values of all tokens, no window, no state."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def rows_of(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of these rows of another, which stays as it is."""
    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])
