"""The history's part of a LoRA layer's output.

PEFT's own layers compute the base layer and the current task's adapter. A forward hook of ours adds what the
frozen history contributes: all earlier adapters of the layer as one stacked pair of matrices, so that the
cost of a step hardly grows with the number of tasks and the history sees no dropout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn
from torch.nn import functional as F

from .history import TaskHistory
from .kept import Kept, tensor_state

UNSUPPORTED_LAYERS = (MultiheadAttention, ParamWrapper)


class StackedHistory(NamedTuple):
    """Several adapters of one layer as one: `x @ down.T @ up.T + bias` is the sum of what each adds."""

    down: torch.Tensor  # (R, in), R = sum of the ranks
    up: torch.Tensor  # (out, R), each adapter's alpha/r folded in
    bias: torch.Tensor | None  # (out,), where an adapter has lora_bias


def attach_history(layer: LoraLayer, tasks: TaskHistory) -> None:
    """Make the layer add its history's output. Calling it again changes nothing but which tasks there are."""
    attached = hasattr(layer, "task_history")
    layer.task_history = tasks
    if not attached:
        layer.stacked_history = Kept()
        layer.declared_frozen = {}
        layer.register_forward_hook(_add_history, with_kwargs=True)


def freeze_names(layer: LoraLayer, frozen: Collection[str], before: Collection[str]) -> None:
    """Declare the weights of the adapters in `frozen` as frozen, through PEFT's own door.

    Args:
        layer: a layer to which the history is attached.
        frozen: adapters that never train.
        before: those for which this was called the last time; what PEFT's own variants declared about an
            adapter that is in `before` only holds again.
    """
    names: dict[str, tuple[str, ...]] = layer.frozen_peft_weight_names
    own = layer.declared_frozen | {name: parts for name, parts in names.items() if name not in before}
    layer.declared_frozen = {name: parts for name, parts in own.items() if name in layer.scaling}
    layer.frozen_peft_weight_names = layer.declared_frozen | dict.fromkeys(frozen, layer.adapter_layer_names)


def adapters_in(layer: LoraLayer, names: Iterable[str]) -> list[str]:
    """Those of `names` that have weights in this layer."""
    return [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]


def matrices_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_A` `(r, in, ...)` and `lora_B` `(out, r, ...)` of one adapter, whatever kind the layer is of."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def tensors_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, ...]:
    """All tensors of one adapter: A, B and, with `lora_bias`, B's bias."""
    if layer.lora_bias.get(name, False):
        return (*matrices_of(layer, name), layer.lora_B[name].bias)
    return matrices_of(layer, name)


def subspace_of(layer: LoraLayer, name: str) -> torch.Tensor:
    """A of one adapter as rows `(r, in)`: the subspace of the task (convolutions flattened)."""
    return matrices_of(layer, name)[0].flatten(1)


def fingerprint(layer: LoraLayer, names: Sequence[str]) -> tuple[Any, ...]:
    """Changes whenever the weights, the scale, the dtype or the place of one of the adapters changed."""
    return tuple((name, layer.scaling[name], *map(tensor_state, tensors_of(layer, name))) for name in names)


def combine_biases(layer: LoraLayer, names: Sequence[str], weights: Sequence[float], combined: str) -> None:
    """Set the bias of the adapter `combined` to the weighted sum of what the others' biases add."""
    parts = [
        layer.lora_B[name].bias.detach() * layer.scaling[name] * weight
        for name, weight in zip(names, weights, strict=True)
        if layer.lora_bias.get(name, False)
    ]
    if parts:
        layer.lora_B[combined].bias.data = torch.stack(parts).sum(0)


def stack(layer: LoraLayer, names: Sequence[str]) -> StackedHistory:
    """Stack the named adapters of a linear or embedding layer; their matrices are not changed."""
    pairs = [matrices_of(layer, name) for name in names]
    scales = [layer.scaling[name] for name in names]
    down = torch.cat([pair[0].detach() for pair in pairs], dim=0)
    up = torch.cat([pair[1].detach() * scale for scale, pair in zip(scales, pairs, strict=True)], dim=1)
    biases = [
        layer.lora_B[name].bias.detach() * scale
        for scale, name in zip(scales, names, strict=True)
        if layer.lora_bias.get(name, False)
    ]
    return StackedHistory(down, up, torch.stack(biases).sum(0) if biases else None)


def _stacked(layer: LoraLayer, names: Sequence[str]) -> StackedHistory:
    """`stack`, kept until something about the adapters changes."""
    if torch.compiler.is_compiling():  # the graph reads the weights themselves: nothing can go stale
        return stack(layer, names)
    kept: Kept[StackedHistory] = layer.stacked_history
    return kept.get(fingerprint(layer, names), lambda: stack(layer, names))


def _contribution(layer: LoraLayer, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """What the named adapters add to the layer's output for input `x`."""
    if any(name in layer.lora_embedding_A for name in names):
        pair = _stacked(layer, names)
        scale = layer._get_embed_scale()
        output = F.linear(F.embedding(x, pair.down.T), pair.up)
        return output if scale is None else output * scale.to(output.dtype)
    if isinstance(layer.lora_A[names[0]], nn.Linear):
        pair = _stacked(layer, names)
        x = layer._cast_input_dtype(x, pair.down.dtype)
        return F.linear(F.linear(x, pair.down), pair.up, pair.bias)
    # convolutions: no pair of matrices to stack
    outputs = []
    for name in names:
        x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        outputs.append(layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name])
    return torch.stack(outputs).sum(0)


def history_in_forward(layer: LoraLayer, active: Iterable[str]) -> list[str]:
    """The frozen adapters that take part in this forward pass next to the active ones."""
    tasks: TaskHistory = layer.task_history
    active = list(active)
    if tasks.alone:
        return []
    tasks.require(active)
    names: list[str] = []
    for name in active:
        if not (layer.training and name in tasks.isolated):
            history = tasks.histories.get(name, ())
            names.extend(old for old in history if old not in names and old not in active)
    return adapters_in(layer, names)


def _add_history(
    layer: LoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook: the layer's output plus its history's."""
    if layer.disable_adapters or layer.merged:
        return output
    batch_names = kwargs.get("adapter_names")
    if batch_names is not None:
        return _add_mixed_history(layer, args, kwargs, batch_names, output)
    names = history_in_forward(layer, layer.active_adapters)
    return output + _contribution(layer, _input(args, kwargs), names).to(output.dtype) if names else output


def _add_mixed_history(
    layer: LoraLayer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_names: Sequence[str],
    output: torch.Tensor,
) -> torch.Tensor:
    """Each row of a mixed batch gets the history of the task it asked for."""
    for name in dict.fromkeys(batch_names):
        names = [] if name == "__base__" else history_in_forward(layer, [name])
        if names:
            rows = [row for row, row_name in enumerate(batch_names) if row_name == name]
            part = _contribution(layer, _input(args, kwargs)[rows], names).to(output.dtype)
            output = output.index_add(0, torch.tensor(rows, device=output.device), part)
    return output


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["x"]
