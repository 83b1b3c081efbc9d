"""Several layers in one upward sweep: each weight is read once for the rows of all of them.

Rows are ordered by the layer that they scale, lowest first. A block runs the rows of the layers that it holds or
that lie below it; the rows of higher layers join at their own block, with what was recorded below it:

    block 2    rows of layer 0 | rows of layer 1 | rows of layer 2
    block 1    rows of layer 0 | rows of layer 1 |      (wait)
    block 0    rows of layer 0 |      (wait)     |      (wait)

So the batch grows as the sweep goes up, and the products stay wide although a single layer has few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .neurons import NeuronLayer
from .prompt_cache import show_rows
from .replay import Recording, patched_forward, take


@contextmanager
def swept(
    layers: Sequence[NeuronLayer],
    recording: Recording,
    batch_size: int,
    rows: torch.Tensor,
    factors: torch.Tensor,
    positions: torch.Tensor,
) -> Iterator[list[torch.Tensor]]:
    """Let the forward pass run inside, on `rows` repeated for each layer, scale one layer in each part of its rows.

    Args:
        layers: of one stack, in the order of its blocks.
        recording: an unscaled pass with the neurons of `layers` and the outputs of the blocks below them.
        batch_size: B of the recording.
        rows: `(R,)`, the example of each row of one layer.
        factors: `(R,)`, k/m of Eq. 10.
        positions: bool `(R, W)`, where neurons are scaled.

    Yields:
        for each layer its scaled neurons `(R, W, size)`: the leaves to differentiate by.
    """
    sweep = _Sweep(layers, recording, batch_size, rows)
    leaves = []
    with ExitStack() as stack:
        for part, layer in enumerate(layers):
            own = recording.neurons_of(layer, rows)
            precise = torch.promote_types(own.dtype, torch.float32)
            leaf = own.to(precise) * factors.to(device=own.device, dtype=precise)[:, None, None]
            leaves.append(leaf.requires_grad_())
            hook = layer.module.register_forward_pre_hook(sweep.put(part, leaf, positions))
            stack.callback(hook.remove)
        blocks = layers[0].blocks
        stack.enter_context(patched_forward(blocks, [sweep.block(i, block) for i, block in enumerate(blocks)]))
        yield leaves


class _Sweep:
    """What the blocks of one sweep share: which rows are under way at which block."""

    def __init__(
        self, layers: Sequence[NeuronLayer], recording: Recording, batch_size: int, rows: torch.Tensor
    ) -> None:
        self.layers, self.recording, self.batch_size, self.rows = layers, recording, batch_size, rows
        self.total = len(rows) * len(layers)
        self.hidden = torch.empty(0)  # the hidden states under way; the model itself is handed placeholders

    def block(self, index: int, block: nn.Module) -> Callable[..., Any]:
        """The forward that block `index` has during the sweep."""
        before = sum(layer.block_index < index for layer in self.layers)
        entering = sum(layer.block_index == index for layer in self.layers)
        if before + entering == 0:
            return lambda *_, **__: self._waiting()
        original, size = block.forward, len(self.rows)
        count = (before + entering) * size

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.pop("hidden_states")
            parts = [self.hidden] if before else []
            if entering:
                entry = _hidden(self._recorded(index - 1)) if index > 0 else given[:size]
                parts += [entry] * entering
            hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
            output = original(hidden, *self._cut(list(args[1:]), count), **self._cut(kwargs, count))
            self.hidden = _hidden(output)
            return self._grown(output, count)

        return forward

    def put(self, part: int, leaf: torch.Tensor, positions: torch.Tensor) -> Callable[..., tuple[Any, ...]]:
        """A pre-hook for the down projection of layer `part`: its neurons replaced in its own rows."""
        size, width = positions.shape
        chosen = positions.to(leaf.device)[..., None]

        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            given = arguments[0]
            own = given.reshape(-1, width, leaf.shape[-1])
            start, stop = part * size, (part + 1) * size
            mixed = torch.where(chosen, leaf.to(own.dtype), own[start:stop])
            return (torch.cat([own[:start], mixed, own[stop:]]).reshape(given.shape), *arguments[1:])

        return replace

    def _recorded(self, index: int) -> Any:
        """What block `index` returned when it was recorded, for the rows of one layer."""
        return take(self.recording.outputs[self.layers[0].stack, index], self.rows, self.batch_size)

    def _waiting(self) -> Any:
        """A block below all layers hands on what the last such block returned."""
        return self._tiled(self._recorded(self.layers[0].block_index - 1), len(self.rows))

    def _cut(self, value: Any, count: int) -> Any:
        """The first `count` rows of everything that has a row for each of all; caches show so many."""
        if isinstance(value, torch.Tensor):
            times, rest = divmod(value.shape[0], self.total) if value.ndim > 1 else (0, 0)
            by_row = times > 0 and rest == 0 and (value.ndim > 2 or not value.is_floating_point())
            return value[: count * times] if by_row else value  # Bloom's alibi has a row for each row and head
        if isinstance(value, Cache):
            show_rows(value, count)
            return value
        if isinstance(value, dict):
            return {key: self._cut(item, count) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._cut(item, count) for item in value)
        return value

    def _grown(self, output: Any, count: int) -> Any:
        """A block's output with a row for every layer; hidden states that the next block does not read are zeros."""
        hidden, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if count < self.total:
            hidden = hidden.detach().new_zeros(()).expand(self.total, *hidden.shape[1:])
        # what else a block returns (a T5's position bias) depends on the example alone
        return hidden if rest is None else (hidden, *(self._tiled(item, count) for item in rest))

    def _tiled(self, value: Any, count: int) -> Any:
        """`value` with `count` rows, the same in every layer's part, as one with all rows."""
        if isinstance(value, torch.Tensor):
            if value.ndim < 2 or value.shape[0] != count or count == self.total:
                return value
            return value[: len(self.rows)].repeat(len(self.layers), *[1] * (value.ndim - 1))
        if isinstance(value, tuple):
            return tuple(self._tiled(item, count) for item in value)
        return value


def _hidden(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
