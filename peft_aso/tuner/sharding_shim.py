"""SHIM: the old sharding.py.

A sharded weight is a `DTensor`, of which each process holds some rows. Nothing here does anything where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

_FSDP = "torch.distributed.fsdp"


def may_shard() -> bool:
    """Whether there are several processes at all, or could be."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether the process holds a part of the tensor only."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this process holds, without gradient; a tensor that is not sharded as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from all processes (each has to ask); gradients go back to each one's part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


class Rows:
    """Matrices of which each process takes its own rows, for a sum over rows that all processes make together.

    Attributes:
        matrices: name -> the rows that this process holds, with their gradient; all rows where the matrices are whole,
            or sharded in any other way than by rows of one mesh.
    """

    def __init__(self, matrices: Mapping[str, torch.Tensor]) -> None:
        self._like: DTensor | None = None
        first = next(iter(matrices.values()), None)
        if first is not None and is_sharded(first) and all(_same_rows(first, other) for other in matrices.values()):
            self._like = first
            self.matrices = {name: matrix.to_local() for name, matrix in matrices.items()}  # type: ignore[attr-defined]
        else:
            self.matrices = {name: whole(matrix) for name, matrix in matrices.items()}

    def total(self, share: torch.Tensor) -> torch.Tensor:
        """The sum of what the processes' rows came to; its gradient is that of this process's share, in its rows."""
        if self._like is None:
            return share
        parts = [Partial() if isinstance(place, Shard) else Replicate() for place in self._like.placements]
        sums = DTensor.from_local(share.detach(), self._like.device_mesh, parts, run_check=False).full_tensor()
        return share + (sums - share.detach())


def _same_rows(first: DTensor, other: torch.Tensor) -> bool:
    if not is_sharded(other) or (other.device_mesh, other.placements) != (first.device_mesh, first.placements):
        return False
    return all(place.is_replicate() or place == Shard(0) for place in other.placements)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the context the model's weights are whole in each process, and its parts can be called one by one.

    All processes have to enter it together. It takes the memory of the whole model in each of them. Values that are
    written inside are lost.
    """
    places = _sharded_places(model) if may_shard() else []
    if not places:
        yield
        return
    held: dict[int, nn.Parameter] = {}
    hooks = _take_hooks(model)
    try:
        for table, name, weight in places:
            if id(weight) not in held:  # a tied weight stays one
                with torch.inference_mode(False), torch.no_grad():
                    held[id(weight)] = nn.Parameter(whole(weight.detach()), requires_grad=weight.requires_grad)
            table[name] = held[id(weight)]
        yield
    finally:
        for table, name, weight in places:
            table[name] = weight
        for hooked, before in hooks:
            now = dict(hooked)
            hooked.clear()  # theirs in their old places, and what came or went in between as it is now
            hooked.update({key: hook for key, hook in before.items() if key in now or _is_fsdp(hook)} | now)


def _sharded_places(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Each sharded weight with the table of its module and its name there."""
    entries = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    weights = [(table, name, table[name]) for table, name in entries]
    return [(table, name, weight) for table, name, weight in weights if weight is not None and is_sharded(weight)]


def _take_hooks(model: nn.Module) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Take FSDP's own hooks out, which would gather and free the weights; each table with what it held before."""
    tables = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    found = [(hooks, dict(hooks)) for hooks in tables if any(map(_is_fsdp, hooks.values()))]
    for hooks, before in found:
        for key in [key for key, hook in before.items() if _is_fsdp(hook)]:
            del hooks[key]
    return found


def _is_fsdp(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_FSDP)
