"""Weights that torch's FSDP2 shards over several processes, gathered where they are read.

A sharded weight is a `DTensor`, of which each process holds some rows. Without sharding nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor


def may_shard() -> bool:
    """Whether this process belongs to a group, so that its weights may be sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds a part of the tensor only."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The complete tensor. Of a sharded one it is gathered, for which every process has to call this; gradients go
    back to each process's part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the context every process holds all weights of the model, and its modules can be called one by one.

    All processes enter it together. It takes the memory of the complete model in each of them. Values that are written
    into weights inside are lost.
    """
    tables: list[dict[str, Any]] = [module._parameters for module in model.modules()] if may_shard() else []
    sharded = [
        (table, name, weight)
        for table in tables
        for name, weight in table.items()
        if weight is not None and is_sharded(weight)
    ]
    if not sharded:
        yield
        return
    full: dict[int, nn.Parameter] = {}  # by the weight's id: a tied weight stays one
    hooks = _remove_fsdp_hooks(model)
    try:
        for table, name, weight in sharded:
            if id(weight) not in full:
                with torch.inference_mode(False), torch.no_grad():
                    full[id(weight)] = nn.Parameter(full_tensor(weight.detach()), requires_grad=weight.requires_grad)
            table[name] = full[id(weight)]
        yield
    finally:
        for table, name, weight in sharded:
            table[name] = weight
        for current, before in hooks:
            new = dict(current)
            current.clear()
            current.update(before | new)  # in their old order, what was registered inside last


def _remove_fsdp_hooks(model: nn.Module) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Remove FSDP's forward hooks, which would gather and free the weights; each table with its former content."""
    removed = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            before = dict(hooks)
            for key in [key for key, hook in before.items() if _is_fsdp(hook)]:
                del hooks[key]
            if len(hooks) < len(before):
                removed.append((hooks, before))
    return removed


def _is_fsdp(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
