"""The history's part of a LoRA layer's output.

PEFT's own layers compute the base layer and the current task's adapter. A forward hook of ours adds what the frozen
history contributes: all earlier adapters of the layer as one stacked pair of matrices, so that the cost of a step
hardly grows with the number of tasks and the history sees no dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn
from torch.nn import functional as F

from .history import TaskHistory

UNSUPPORTED_LAYERS = (MultiheadAttention, ParamWrapper)


class StackedHistory(NamedTuple):
    """Several adapters of one layer as one: `x @ down.T @ up.T + bias` is the sum of what each adds."""

    down: torch.Tensor  # (R, in), R = sum of the ranks
    up: torch.Tensor  # (out, R), each adapter's alpha/r folded in
    bias: torch.Tensor | None  # (out,), where an adapter has lora_bias


def attach_history(layer: LoraLayer, tasks: TaskHistory) -> None:
    """Make the layer add its history's output. Once a layer; calling it again changes nothing."""
    if getattr(layer, "task_history", None) is tasks:
        return
    layer.task_history = tasks
    layer.stacked_history = {}
    layer.register_forward_hook(_add_history, with_kwargs=True)


def adapters_in(layer: LoraLayer, names: Iterable[str]) -> list[str]:
    """Those of `names` that have weights in this layer."""
    return [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]


def matrices_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_A` `(r, in, ...)` and `lora_B` `(out, r, ...)` of one adapter, of linear, embedding or other layers."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def subspace_of(layer: LoraLayer, name: str) -> torch.Tensor:
    """A of one adapter as rows `(r, in)`: the subspace of the task (convolutions flattened)."""
    return matrices_of(layer, name)[0].flatten(1)


def fingerprint(layer: LoraLayer, names: Sequence[str]) -> tuple[Any, ...]:
    """Changes whenever the weights, the scale, the dtype or the place of one of the adapters changed."""
    key: list[Any] = []
    for name in names:
        key += [name, layer.scaling[name]]
        for matrix in matrices_of(layer, name):
            key += [matrix.data_ptr(), matrix._version, matrix.dtype, matrix.device]
    return tuple(key)


def stack(layer: LoraLayer, names: Sequence[str]) -> StackedHistory:
    """Stack the named adapters of a linear or embedding layer; their matrices are not changed."""
    pairs = [matrices_of(layer, name) for name in names]
    down = torch.cat([pair[0].detach() for pair in pairs], dim=0)
    up = torch.cat([pair[1].detach() * layer.scaling[name] for name, pair in zip(names, pairs, strict=True)], dim=1)
    biases = [
        layer.lora_B[name].bias.detach() * layer.scaling[name] for name in names if layer.lora_bias.get(name, False)
    ]
    return StackedHistory(down, up, torch.stack(biases).sum(0) if biases else None)


def _stacked(layer: LoraLayer, names: Sequence[str]) -> StackedHistory:
    """`stack`, kept until something about the adapters changes."""
    if torch.compiler.is_compiling():  # the graph reads the weights themselves: nothing can go stale
        return stack(layer, names)
    key = fingerprint(layer, names)
    held = layer.stacked_history.get("pair")
    if held is None or held[0] != key:
        held = layer.stacked_history["pair"] = (key, stack(layer, names))
    return held[1]


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
            names.extend(old for old in tasks.histories.get(name, ()) if old not in names and old not in active)
    return adapters_in(layer, names)


def _add_history(layer: LoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """Forward hook: the layer's output plus its history's."""
    if layer.disable_adapters or layer.merged:
        return output
    x = args[0] if args else kwargs["x"]
    batch_names = kwargs.get("adapter_names")
    if batch_names is not None:
        return _add_mixed_history(layer, x, batch_names, output)
    names = history_in_forward(layer, layer.active_adapters)
    return output + _contribution(layer, x, names).to(output.dtype) if names else output


def _add_mixed_history(layer: LoraLayer, x: torch.Tensor, batch_names: list[str], output: torch.Tensor) -> torch.Tensor:
    """Each row of a mixed batch gets the history of the task it asked for."""
    output = output.clone()
    for name in dict.fromkeys(batch_names):
        names = [] if name == "__base__" else history_in_forward(layer, [name])
        if names:
            rows = [row for row, row_name in enumerate(batch_names) if row_name == name]
            output[rows] += _contribution(layer, x[rows], names).to(output.dtype)
    return output
