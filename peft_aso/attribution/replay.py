"""Recording one forward pass of a model, and replaying parts of it.

Attribution looks at one layer at a time. What comes below that layer is the same in every step, so it is
recorded once and handed on (`skipped`), and the layer's neurons are replaced by a fraction of what they were
(`scaled`). Whatever these contexts put on a module is gone when they end, after an exception too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .neurons import NeuronLayer


@dataclass
class Recording:
    """One unscaled forward pass.

    Attributes:
        neurons: layer name to the input of its down projection, `(B, W, size)`.
        outputs: (stack, block index) to what that block returned.
        log_probability: `(B,)`, set by whoever ran the pass.
        live: layer name to the same neurons as they stand in the pass's graph, to differentiate by; if asked for.
    """

    neurons: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Any] = field(default_factory=dict)
    log_probability: torch.Tensor | None = None
    live: dict[str, torch.Tensor] = field(default_factory=dict)

    def neurons_of(self, layer: NeuronLayer, rows: torch.Tensor) -> torch.Tensor:
        """The neurons of `layer` with its examples repeated as `rows` says, `(R, W, size)`."""
        neurons = self.neurons[layer.name]
        return neurons.expand(len(rows), -1, -1) if len(neurons) == 1 else neurons[rows.to(neurons.device)]


@contextmanager
def recorded(
    layers: Sequence[NeuronLayer], positions: dict[str, torch.Tensor], outputs: bool, live: bool = False
) -> Iterator[Recording]:
    """Record the neurons of `layers` in the forward pass run inside, and (`outputs`) the block below each.

    Args:
        live: keep them in the graph too.

    Raises:
        ValueError: a layer that ran not once but several times (weights shared by blocks) or never, or whose
            input is not one vector per position (experts).
    """
    recording = Recording()
    runs = {layer.name: 0 for layer in layers}

    def on_neurons(layer: NeuronLayer, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        runs[layer.name] += 1
        given = arguments[0] if arguments[0].requires_grad or not live else arguments[0].detach().requires_grad_()
        by_position = _by_position(given, positions[layer.stack], layer)
        recording.neurons[layer.name] = by_position.detach()
        if live:
            recording.live[layer.name] = given
        return (given, *arguments[1:])

    with ExitStack() as stack:
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(lambda _, args, layer=layer: on_neurons(layer, args))
            stack.callback(hook.remove)
            below = (layer.stack, layer.block_index - 1)
            if outputs and layer.block_index > 0:
                block = layer.blocks[layer.block_index - 1]

                def keep(_: nn.Module, __: Any, output: Any, key: tuple[str, int] = below) -> None:
                    recording.outputs[key] = _detached(output)

                stack.callback(block.register_forward_hook(keep).remove)
        yield recording
    for name, count in runs.items():
        if count != 1:
            raise ValueError(
                f"{name} ran {count} times in one forward pass, so it has no single set of neurons (blocks "
                "that share weights, or experts); leave it out with `neurons=`"
            )


def _detached(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach()
    return type(output)(map(_detached, output)) if isinstance(output, (tuple, list)) else output


@contextmanager
def scaled(
    layer: NeuronLayer, neurons: torch.Tensor, factors: torch.Tensor, positions: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Replace the neurons of `layer` by `factors * neurons` at `positions` in the forward pass run inside.

    Args:
        neurons: `(R, W, size)`, the unscaled neurons of each row.
        factors: `(R,)`, k/m of Eq. 10.
        positions: bool `(R, W)`.

    Yields:
        the scaled neurons, `(R, W, size)`, at least float32: the leaf to differentiate by.
    """
    precise = torch.promote_types(neurons.dtype, torch.float32)
    leaf = (neurons.to(precise) * factors.to(device=neurons.device, dtype=precise)[:, None, None]).requires_grad_()
    chosen = positions.to(neurons.device)[..., None]

    def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        own = arguments[0]
        mixed = torch.where(chosen, leaf.to(own.dtype), _by_position(own, positions, layer))
        return (mixed.reshape(own.shape), *arguments[1:])

    hook = layer.module.register_forward_pre_hook(replace)
    try:
        yield leaf
    finally:
        hook.remove()


@contextmanager
def skipped(layer: NeuronLayer, recording: Recording, batch_size: int, rows: torch.Tensor) -> Iterator[None]:
    """Let the blocks below `layer` return what the one just below it returned when it was recorded, for
    `rows`."""
    below = layer.blocks[: max(layer.block_index, 0)]
    if not below:
        yield
        return
    output = take(recording.outputs[layer.stack, layer.block_index - 1], rows, batch_size)

    def hand_on(*_: Any, **__: Any) -> Any:
        return output

    with patched_forward(below, [hand_on] * len(below)):
        yield


@contextmanager
def patched_forward(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Give each block another forward inside."""
    # a block may already carry a forward of its own (accelerate puts one there): it goes back as it was
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is not None:
                block.forward = before
            else:
                block.__dict__.pop("forward", None)


def take(value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    """`value` with its examples repeated as `rows` says, through tuples, lists and dicts.

    Tensors whose first dimension is not the batch are shared by all rows (a T5's position bias) and stay.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != batch_size:
            return value
        if batch_size == 1:
            return value.expand(len(rows), *value.shape[1:])
        return value.index_select(0, rows.to(value.device))
    if isinstance(value, tuple):
        return tuple(take(item, rows, batch_size) for item in value)
    if isinstance(value, list):
        return [take(item, rows, batch_size) for item in value]
    if isinstance(value, dict):  # a ModelOutput is one, and stays one
        return type(value)(**{key: take(item, rows, batch_size) for key, item in value.items()})
    return value


def _by_position(neurons: torch.Tensor, positions: torch.Tensor, layer: NeuronLayer) -> torch.Tensor:
    """`(R, W, size)` from what a down projection is given: some models (OPT, once) flatten rows and
    positions."""
    rows, width = positions.shape
    if neurons.numel() != rows * width * layer.size:
        raise ValueError(
            f"the input of {layer.name} has shape {tuple(neurons.shape)}, not one vector of {layer.size} for "
            f"each of {rows} x {width} positions (experts see some tokens only); leave it out with `neurons=`"
        )
    return neurons.reshape(rows, width, layer.size)
