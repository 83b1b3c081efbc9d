"""A cache of keys and values that is read and never written.

The prompt's keys and values are computed once for each example. Many forward passes over the answer read
them, each with its own choice of examples as rows, and nothing of the new is kept. There are two ways to show them:
copied (`update` answers with the prompt's and the new ones side by side, a copy a row), or shared (`update` answers
with the new ones alone, and the prompt goes to the attention of shared_attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

from .replay import take
from .shared_attention import Handover, Prompt, RowPlan


class FixedLayer(CacheLayerMixin):
    """Keys and values of one attention layer, `(B, heads, P, head_dim)`, shown to `rows` of examples.

    Without keys and values it is an empty prompt: P is 0 and `update` gives back what it was given. With a
    `handover` and the `plan` of the rows they are shared, else copied.
    """

    def __init__(
        self,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        handover: Handover | None = None,
        plan: RowPlan | None = None,
    ) -> None:
        self._keys, self._values, self._rows = keys, values, rows
        self._handover, self._plan = handover, plan
        self.shown_rows: int | None = None  # None: all of `rows`
        self.is_initialized = keys is not None

    def _shown(self, states: torch.Tensor | None) -> torch.Tensor | None:
        if states is None or self._rows is None:
            return states
        return take(states, self._rows[: self.shown_rows], states.shape[0])

    def _offer(self, whole: bool) -> bool:
        """Hand the prompt to the attention that follows, where it is shared."""
        if self._handover is None or self._plan is None or self._keys is None or self._values is None:
            return False
        plan = self._plan.shown(self.shown_rows)
        self._handover.offer(Prompt(plan.of_examples(self._keys), plan.of_examples(self._values), plan, whole))
        return True

    # cross-attention reads these two, keys first, and calls no `update`
    @property
    def keys(self) -> torch.Tensor | None:
        return self._keys if self._offer(whole=True) else self._shown(self._keys)

    @property
    def values(self) -> torch.Tensor | None:
        return self._values if self._handover is not None else self._shown(self._values)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: what there is was given at the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._offer(whole=False):
            return key_states, value_states
        keys, values = self._shown(self._keys), self._shown(self._values)
        if keys is None or values is None:
            return key_states, value_states
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return 0 if self._keys is None else self._keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def writable(encoder_decoder: bool) -> Cache:
    """A cache to fill with a prompt. Sliding layers keep all their keys in it: masks, not the cache, cut them
    off."""
    if encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache()


def empty_prompt(encoder_decoder: bool) -> Cache:
    """The cache of a prompt without tokens; for an encoder-decoder, the cross-attention part is yet to be
    filled."""
    fixed = Cache(layer_class_to_replicate=FixedLayer)
    return EncoderDecoderCache(fixed, DynamicCache()) if encoder_decoder else fixed


def read_only(cache: Cache, rows: torch.Tensor, handover: Handover | None = None) -> Cache:
    """`cache` as a read-only one whose batch is `rows` of its examples; shared through `handover`, or copied.

    Raises:
        SharingUnsupported: shared, and the rows do not repeat whole examples.
    """
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return EncoderDecoderCache(*(read_only(part, rows, handover) for part in parts))
    plan = RowPlan.of(rows) if handover is not None else None
    layers = []
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin):
            raise TypeError(f"a {type(layer).__name__} keeps a running state, not one key and value for each token")
        keys, values = (layer._keys, layer._values) if isinstance(layer, FixedLayer) else (layer.keys, layer.values)
        layers.append(FixedLayer(keys, values, rows, handover, plan))
    return Cache(layers=layers) if layers else Cache(layer_class_to_replicate=FixedLayer)


def show_rows(cache: Cache, count: int) -> None:
    """Let a read-only cache show the first `count` of its rows from now on."""
    if isinstance(cache, EncoderDecoderCache):
        show_rows(cache.self_attention_cache, count)
        show_rows(cache.cross_attention_cache, count)
        return
    for layer in cache.layers:
        if isinstance(layer, FixedLayer):
            layer.shown_rows = count


def floats_per_row(cache: Cache) -> int:
    """How many numbers one row of the cache shows to the model, over all layers."""
    if isinstance(cache, EncoderDecoderCache):
        return floats_per_row(cache.self_attention_cache) + floats_per_row(cache.cross_attention_cache)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor[0].numel() for tensor in tensors)


def keys_per_row(cache: Cache) -> int:
    """How many keys one query of a row attends to in the cache, over all layers."""
    if isinstance(cache, EncoderDecoderCache):
        return keys_per_row(cache.self_attention_cache) + keys_per_row(cache.cross_attention_cache)
    return sum(int(layer.get_seq_length()) for layer in cache.layers)
