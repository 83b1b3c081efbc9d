"""A prefix's keys and values, computed once and read by many rows of later forward passes.

The rows of a pass repeat a few examples hundreds of times. Their prefix is copied or shared (`PrefixLayer`):

- copied: the cache returns the prefix's and the new keys and values in one tensor, a copy for each row. This works
  with every attention.
- shared: the cache returns the new ones alone, and an attention function in transformers' registry adds the prefix,
  with one matrix product for all rows of an example. This is twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "peft_aso_shared_prefix"


class SharingUnsupported(RuntimeError):
    """This model's attention cannot share a prefix between rows; copies can be used."""


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with the function applied to its tensors, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):  # a ModelOutput is one, and stays one
        return type(value)(**{name: each_tensor(function, item) for name, item in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(each_tensor(function, item) for item in value)
    return value


@dataclass
class Rows:
    """The rows of a forward pass: each of the examples `nodes` times. Examples (0, 1) at 2 nodes are 0 0 1 1.

    Attributes:
        examples: int64 `(E,)`, indices into the batch.
        of_batch: how many examples the batch has.
    """

    examples: torch.Tensor
    of_batch: int
    nodes: int = 1

    def indices(self) -> torch.Tensor:
        """The example of each row, `(R,)`."""
        return self.examples.repeat_interleave(self.nodes)

    def take(self, value: Any) -> Any:
        """The tensors in `value` that have the batch in their first dimension, with these rows; others stay."""

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 0 or len(tensor) != self.of_batch:
                return tensor
            if self.of_batch == 1:
                return tensor.expand(len(self.examples) * self.nodes, *tensor.shape[1:])
            return tensor.index_select(0, self.indices().to(tensor.device))

        return each_tensor(taken, value)

    def by_example(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """`(R, heads * g, W, d)` as `(E, heads, n, g, W, d)`: the n rows of an example in one dimension."""
        _, many, width, size = states.shape
        split = states.view(len(self.examples), self.nodes, heads, many // heads, width, size)
        return split.transpose(1, 2)

    def by_row(self, states: torch.Tensor) -> torch.Tensor:
        """`(E, heads, n, g, W, d)` as `(R, W, heads * g, d)`, the layout of an attention's output."""
        return states.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1)


# at most one: the prefix that the next attention adds, and whether it attends to nothing else (cross-attention);
# None outside of `shared_prefixes`
_pending: ContextVar[list[tuple[PrefixLayer, bool]] | None] = ContextVar("pending", default=None)


class PrefixLayer(CacheLayerMixin):
    """Keys and values of one attention layer, `(B, heads, P, d)`, for `rows`; nothing is ever added.

    Without keys the prefix is empty, and `update` returns its arguments.
    """

    def __init__(
        self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, rows: Rows | None = None,
        shared: bool = False,
    ) -> None:  # fmt: skip
        self.prefix, self.rows, self.shared = (keys, values), rows, shared
        self.is_initialized = keys is not None

    def of_examples(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the rows' examples, `(E, heads, P, d)` each."""
        keys, values = self.prefix
        assert keys is not None and values is not None
        return keys[rows.examples], values[rows.examples]

    def _hand_over(self, alone: bool) -> bool:
        """Leave the prefix to the attention that follows, if it is shared."""
        pending = _pending.get()
        if not self.shared or pending is None or self.prefix[0] is None:
            return False
        _check_taken(pending)
        pending.append((self, alone))
        return True

    # cross-attention reads these two, keys first, and calls no `update`
    @property
    def keys(self) -> torch.Tensor | None:
        return self.prefix[0] if self.rows is None or self._hand_over(alone=True) else self.rows.take(self.prefix[0])

    @property
    def values(self) -> torch.Tensor | None:
        return self.prefix[1] if self.rows is None or self.shared else self.rows.take(self.prefix[1])

    def lazy_initialization(self, *states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rows is None or self.prefix[0] is None or self._hand_over(alone=False):
            return key_states, value_states
        keys, values = self.rows.take(self.prefix)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return 0 if self.prefix[0] is None else self.prefix[0].shape[-2]

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:  # transformers 5.0 gives the positions
        return self.get_seq_length() + (query if isinstance(query, int) else len(query)), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0


def prefix_cache(cache: Cache, rows: Rows, shared: bool) -> Cache:
    """A read-only view of a filled cache for the rows of one pass.

    Raises:
        TypeError: the model has layers with a running state instead of keys and values.
    """
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return EncoderDecoderCache(*(prefix_cache(part, rows, shared) for part in parts))
    if not cache.layers:
        return Cache(layer_class_to_replicate=PrefixLayer)
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin):
            raise TypeError(f"a {type(layer).__name__} has a running state, not keys and values for each token")
    return Cache(layers=[PrefixLayer(layer.keys, layer.values, rows, shared) for layer in cache.layers])


@contextmanager
def shared_prefixes(model: nn.Module) -> Iterator[None]:
    """Inside, the model's attention is `shared_prefix_attention`; every shared prefix has to pass through it.

    Raises:
        SharingUnsupported: a prefix was left over.
    """
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    own = [(c, c._attn_implementation_internal) for c in configs.values() if isinstance(c, PretrainedConfig)]
    pending: list[tuple[PrefixLayer, bool]] = []
    token = _pending.set(pending)
    try:
        for config, _ in own:
            config._attn_implementation_internal = NAME
        yield
        _check_taken(pending)
    finally:
        _pending.reset(token)
        for config, name in own:
            config._attn_implementation_internal = name


def _check_taken(pending: list[tuple[PrefixLayer, bool]]) -> None:
    if pending:
        raise SharingUnsupported("an attention of this model does not go through transformers' registry")


def shared_prefix_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, position_bias: torch.Tensor | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention to the pending prefix and the new keys; without a prefix it is transformers' own sdpa.

    The interface is that of transformers: queries `(R, H, W, d)`, the output `(R, W, H, d)`.

    Raises:
        SharingUnsupported: an attention with a softcap, sinks or dropout, or with shapes other than the cache's.
    """
    pending = _pending.get()
    if not pending:  # no prefix
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs,
        )  # fmt: skip
        return found
    layer, alone = pending.pop()
    assert layer.rows is not None
    rows = layer.rows
    prefix_keys, prefix_values = layer.of_examples(rows)
    heads, length, width = prefix_keys.shape[1], prefix_keys.shape[2], query.shape[2]
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise SharingUnsupported("an attention with dropout, softcap or sinks")
    if query.shape[1] % heads or (not alone and key.shape[1::2] != prefix_keys.shape[1::2]):
        raise SharingUnsupported(f"keys of shape {tuple(key.shape)}, and in the cache {tuple(prefix_keys.shape)}")

    q = rows.by_example(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), heads)
    shape = q.shape[:-1]  # (E, heads, n, g, W)
    scores = (q.flatten(2, 4) @ prefix_keys.mT).view(*shape, length)
    own = 0 if alone else width
    if own:
        k, v = (rows.by_example(each, heads).squeeze(3) for each in (key, value))  # (E, heads, n, W, d)
        scores = torch.cat([scores, (q.flatten(3, 4) @ k.mT).view(*shape, own)], -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is None and own > 1 and getattr(module, "is_causal", True):
        attention_mask = torch.ones(1, 1, width, length + own, dtype=torch.bool, device=query.device).tril(length)
    for bias in (attention_mask, position_bias):
        if bias is not None:
            scores = scores + _by_example(bias, rows, scores.shape)
    to_prefix, to_own = scores.softmax(-1).to(query.dtype).split([length, own], -1)
    attended = (to_prefix.flatten(2, 4) @ prefix_values).view(q.shape)
    if own:
        attended = attended + (to_own.flatten(3, 4) @ v).view(q.shape)
    return rows.by_row(attended), None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _by_example(bias: torch.Tensor, rows: Rows, shape: torch.Size) -> torch.Tensor:
    """A mask or bias to add to scores `(E, heads, n, g, W, keys)`; all rows of an example have the same."""
    _, heads, _, group, width, keys = shape
    if bias.shape[-2:] != (width, keys):
        raise SharingUnsupported(f"a mask or bias of shape {tuple(bias.shape)} for {keys} keys")
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill_(~bias, torch.finfo(torch.float32).min)
    if len(bias) > 1:
        bias = bias[:: rows.nodes]
    per_head = (heads, 1, group) if bias.shape[1] > 1 else (1, 1, 1)
    return bias.detach().float().view(len(bias), *per_head, width, keys)
