"""What the frozen history adds to a LoRA layer's output.

PEFT's own layers compute the base layer and the current task's adapter. All earlier adapters of the layer are added
here in one form (`forms`), so that the cost of a step hardly grows with the number of tasks and the history sees no
dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F

from .forms import (
    DenseHistory,
    FoldedHistory,
    Form,
    StackedHistory,
    build,
    compute_dtype,
    fold_obstacle,
    half_autocast,
    rounds,
)
from .history import TaskHistory
from .layer import adapters_in


def form_in_forward(
    layer: LoraLayer, x: torch.Tensor, active: tuple[str, ...], can_fold: bool, glance: int | None = None
) -> Form | None:
    """The history that takes part in this forward pass, in its form; None if there is none, or of a convolution.

    Args:
        x: the layer's input.
        can_fold: whether the caller can run the base layer with a folded weight.
        glance: of how many of the history's weights to make sure that they are what they were; None: of all.
    """
    names = _history(layer, active)
    if not names or _is_convolution(layer):
        return None
    wanted = layer.task_history.forms[active[0]]
    if torch.compiler.is_compiling():  # the graph reads the weights themselves: nothing can go stale
        present = adapters_in(layer, names)
        return build(layer, present, "stacked", None) if present else None
    half = half_autocast(x.device.type)
    if layer.task_history.sharded:  # whole in this pass only: to keep it would be to undo the sharding
        present = adapters_in(layer, names)
        return build(layer, present, "stacked", compute_dtype(x, half)) if present else None
    can_fold = can_fold and wanted in ("auto", "folded") and fold_obstacle(layer) is None
    if can_fold and (wanted == "folded" or not rounds(layer, half)):
        return _kept(layer, names, "folded", None, glance)
    return _kept(layer, names, "auto" if wanted == "folded" else wanted, compute_dtype(x, half), glance)


def _history(layer: LoraLayer, active: tuple[str, ...]) -> tuple[str, ...]:
    """The frozen adapters of the model that take part next to the active ones."""
    tasks: TaskHistory = layer.task_history
    if torch.compiler.is_compiling():  # a graph that reads the table of results is compiled again as the table grows
        return tasks.resolve(active, layer.training)
    return tasks.in_forward(active, layer.training)


def _kept(
    layer: LoraLayer, names: tuple[str, ...], wanted: str, dtype: torch.dtype | None, glance: int | None
) -> Form | None:
    form: Form | None = layer.history_cache.get(
        layer,
        names,
        (wanted, dtype),
        lambda present: build(layer, present, wanted, dtype),
        with_base=wanted == "folded",
        glance=glance,
    )
    return form


def add_form(layer: LoraLayer, x: torch.Tensor, form: StackedHistory | DenseHistory) -> torch.Tensor:
    """What the history adds to the layer's output for the input `x`."""
    if layer.lora_embedding_A:
        if isinstance(form, DenseHistory):
            output = F.embedding(x, form.delta.T)
        else:
            output = F.linear(F.embedding(x, form.down.T), form.up)
        scale = layer._get_embed_scale()
        return output if scale is None else output * scale.to(output.dtype)
    x = layer._cast_input_dtype(x, form[0].dtype)
    if isinstance(form, DenseHistory):
        return F.linear(x, form.delta, form.bias)
    return F.linear(F.linear(x, form.down), form.up, form.bias)


def add_history(layer: LoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """The layer's output plus its history's; a forward hook."""
    if layer.disable_adapters or layer.merged:
        return output
    batch_names = kwargs.get("adapter_names")
    if batch_names is not None:
        return _add_mixed_history(layer, _input(args, kwargs), batch_names, output)
    active = tuple(layer.active_adapters)
    if not _history(layer, active):
        return output
    part = _contribution(layer, _input(args, kwargs), active)
    return output if part is None else output + part.to(output.dtype)


def _contribution(layer: LoraLayer, x: torch.Tensor, active: tuple[str, ...]) -> torch.Tensor | None:
    """What the history of the active adapters adds to the output for `x`, however the layer computes it."""
    if not _is_convolution(layer):
        form = form_in_forward(layer, x, active, can_fold=False)
        return None if form is None or isinstance(form, FoldedHistory) else add_form(layer, x, form)
    # no pair of matrices to stack
    outputs = []
    for name in adapters_in(layer, _history(layer, active)):
        x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        outputs.append(layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name])
    return torch.stack(outputs).sum(0) if outputs else None


def _add_mixed_history(
    layer: LoraLayer, x: torch.Tensor, batch_names: Sequence[str], output: torch.Tensor
) -> torch.Tensor:
    """Each row of a mixed batch gets the history of the task it asked for."""
    for name in dict.fromkeys(batch_names):
        rows = [row for row, row_name in enumerate(batch_names) if row_name == name]
        part = None if name == "__base__" else _contribution(layer, x[rows], (name,))
        if part is not None:
            output = output.index_add(0, torch.tensor(rows, device=output.device), part.to(output.dtype))
    return output


def _is_convolution(layer: LoraLayer) -> bool:
    first = next(iter(layer.lora_A._modules.values()), None)  # all of the layer's A matrices are of one kind
    return first is not None and not isinstance(first, nn.Linear)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The layer's input, however it was handed over."""
    return args[0] if args else kwargs["x"]
