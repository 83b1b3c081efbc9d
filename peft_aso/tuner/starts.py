"""Starts of a new task's A, outside of the span of its history's A (Eq. 4). One registered function each.

A start is a function `(A, history, inputs=None) -> A` of one module: A `(r, in)` as PEFT started it, the earlier
tasks' updates, oldest first, and the second moment `(in, in)` of the task's inputs (float64; None: there were none, or
the start does not need them). `ASOLoraConfig(project_init=<name>)` chooses one by name; `True` is `"random"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .low_rank import LowRank

Start = Callable[..., torch.Tensor]
STARTS: dict[str, Start] = {}
_NEED_INPUTS: set[str] = set()


def register_start(name: str, needs_inputs: bool = False) -> Callable[[Start], Start]:
    """Register a start under a name that `ASOLoraConfig(project_init=...)` takes.

    Args:
        needs_inputs: the start is called before the first step, with the second moments of the task's inputs.
    """

    def register(function: Start) -> Start:
        STARTS[name] = function
        if needs_inputs:
            _NEED_INPUTS.add(name)
        return function

    return register


def needs_inputs(name: object) -> bool:
    """Whether a value of `project_init` names a start that needs the inputs of the task."""
    return name in _NEED_INPUTS


@register_start("random")
def random_start(A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None) -> torch.Tensor:
    """PEFT's random A without its part in the span of the history's rows: A_t^T A = 0 for every earlier t (Eq. 4).

    Raises:
        ValueError: the history's rows span the whole input space.
    """
    return _outside(_exact(A), _span([update.A for update in history])).to(A) if history else A


@register_start("inputs", needs_inputs=True)
def inputs_start(A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None) -> torch.Tensor:
    """The leading directions of the task's inputs outside of the span of the history's rows, orthonormal rows.

    They are the leading eigenvectors of P M P, strongest first, where M is the second moment of the inputs and P the
    projection out of the history's span. Where the inputs have fewer directions than A has rows, the others are random
    ones outside of both. InfLoRA (Liang and Li, CVPR 2024) starts A from the inputs too, outside of a memory of
    earlier tasks' inputs; here the history's rows stand for them. PEFT's EVA takes the directions without a history.

    Raises:
        ValueError: the history's rows leave fewer input dimensions than A has rows.
    """
    random = _exact(A)
    taken = _span([update.A for update in history]) if history else random[:0]
    rows = random[:0]
    if inputs is not None:
        moment = inputs.to(random)
        values, vectors = torch.linalg.eigh(_outside(_outside(moment, taken).T, taken))
        smallest = moment.trace() * len(moment) * torch.finfo(moment.dtype).eps  # below it lies what rounding adds
        rows = vectors.T[values > smallest].flip(0)[: len(A)]
    if len(rows) < len(A):
        taken = torch.cat([taken, rows])
        others = _span([_outside(random, taken)])
        rows = torch.cat([rows, others[_outside(others, taken).norm(dim=1) > 0.5]])[: len(A)]
    if len(rows) < len(A):
        raise ValueError(
            f"The history's rows leave {len(rows)} of a layer's {A.shape[1]} input dimensions to an adapter of rank "
            f"{len(A)}. Use smaller ranks, or leave project_init off."
        )
    return rows.to(A)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where the device has no such numbers."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _span(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """An orthonormal basis `(k, in)`, float64, of what the rows of matrices `(r_t, in)` span."""
    together = torch.cat([_exact(matrix) for matrix in matrices])
    _, singular, basis = torch.linalg.svd(together, full_matrices=False)
    basis = basis[singular > singular.max() * max(together.shape) * torch.finfo(torch.float32).eps]
    if len(basis) >= together.shape[1]:
        raise ValueError(
            f"project_init: the history's rows span all {together.shape[1]} input dimensions of a module, and "
            "nothing is left for a new task. Use smaller ranks, or leave project_init off."
        )
    return basis


def _outside(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows `(n, in)` without their part in the span of an orthonormal basis: x - Q^T Q x."""
    return rows - (rows @ basis.T) @ basis
