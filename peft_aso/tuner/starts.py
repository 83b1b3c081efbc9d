"""Starts of a new task's A, outside of the span of its history's A (Eq. 4). One registered function each.

A start is a function `(A, history, inputs=None, psi=None, **options) -> A` of one module: A `(r, in)` as PEFT started
it, the earlier tasks' updates, oldest first, the second moment `(in, in)` of the task's inputs (float64; None: there
were none, or the start does not need them), psi of each earlier task `(T,)` (None: 1), and what
`ASOLoraConfig(start_options={...})` sets. `ASOLoraConfig(project_init=<name>)` chooses one by name; `True` is
`"random"`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .low_rank import LowRank, input_rows, second_moment

Start = Callable[..., torch.Tensor]
STARTS: dict[str, Start] = {}
_NEED_INPUTS: set[str] = set()
_NEED_HISTORY_INPUTS: set[str] = set()


def register_start(
    name: str, needs_inputs: bool = False, needs_history_inputs: bool = False
) -> Callable[[Start], Start]:
    """Register a start under a name that `ASOLoraConfig(project_init=...)` takes.

    Args:
        needs_inputs: the start is called before the first step, with the second moments of the task's inputs.
        needs_history_inputs: it reads the input directions that the earlier tasks store.
    """

    def register(function: Start) -> Start:
        STARTS[name] = function
        if needs_inputs:
            _NEED_INPUTS.add(name)
        if needs_history_inputs:
            _NEED_HISTORY_INPUTS.add(name)
        return function

    return register


def needs_inputs(name: object) -> bool:
    """Whether a value of `project_init` names a start that needs the inputs of the task."""
    return name in _NEED_INPUTS


def needs_history_inputs(name: object) -> bool:
    """Whether a value of `project_init` names a start that reads the earlier tasks' input directions."""
    return name in _NEED_HISTORY_INPUTS


@register_start("random")
def random_start(
    A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None, psi: torch.Tensor | None = None
) -> torch.Tensor:
    """PEFT's random A without its part in the span of the history's rows: A_t^T A = 0 for every earlier t (Eq. 4).

    Raises:
        ValueError: the history's rows span the whole input space.
    """
    return _outside(_exact(A), _span([update.A for update in history])).to(A) if history else A


@register_start("inputs", needs_inputs=True)
def inputs_start(
    A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None, psi: torch.Tensor | None = None
) -> torch.Tensor:
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


@register_start("contrast", needs_inputs=True, needs_history_inputs=True)
def contrast_start(
    A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None, psi: torch.Tensor | None = None,
    *, ridge: float = 0.01, row_scale: float = 3.0,
) -> torch.Tensor:  # fmt: skip
    """The directions in which the task's inputs are strongest compared with those of the earlier tasks.

    The rows are the leading generalized eigenvectors of (C_new, C_old + ridge I), where C_old is the mean over the
    earlier tasks of psi_t^2 C_t: tasks that share knowledge neurons may share input directions. With `train_a=False`
    the task hardly reads what earlier tasks read. A first task starts as PEFT starts it.

    Args:
        ridge: in units of the mean of C's diagonal; larger, the task's strongest inputs count more.
        row_scale: how strong the rows are on the task's inputs (root of the energy), compared with A as it was.

    Raises:
        MissingInputsError: an earlier task stores no input directions.
    """
    if not history or inputs is None or not inputs.any():
        return A
    random = _exact(A)
    width = A.shape[1]
    new = inputs.to(random) * (width / inputs.trace())
    old = ridge * torch.eye(width, dtype=random.dtype, device=random.device)
    for update, soft in zip(history, psi if psi is not None else torch.ones(len(history)), strict=True):
        old = old + float(soft) ** 2 * second_moment(update, random) / len(history)
    inverse = torch.linalg.inv(torch.linalg.cholesky(old))
    _, vectors = torch.linalg.eigh(inverse @ new @ inverse.T)
    rows = (inverse.T @ vectors[:, -len(A) :]).T.flip(0)
    strength = ((rows @ new) * rows).sum(1).sqrt()
    wanted = ((random @ new) * random).sum(1).mean().sqrt() * row_scale
    return (rows * (wanted / strength)[:, None]).to(A)


@register_start("inflora", needs_inputs=True, needs_history_inputs=True)
def inflora_start(
    A: torch.Tensor, history: Sequence[LowRank], inputs: torch.Tensor | None = None, psi: torch.Tensor | None = None,
    *, energy: float = 0.95,
) -> torch.Tensor:  # fmt: skip
    """The leading directions of the task's inputs outside of a memory of the earlier tasks' inputs, of length 3^-0.5.

    InfLoRA (Liang and Li, CVPR 2024), which fixes A (`train_a=False`). The memory grows task by task by the leading
    directions that bring its share of the task's inputs to `energy` (gradient projection memory, Saha et al. 2021).

    Args:
        energy: share of each earlier task's second moment that the memory spans; tasks store only their
            `input_directions`, so that this is a share of those.

    Raises:
        MissingInputsError: an earlier task stores no input directions.
        ValueError: the memory leaves fewer dimensions than A has rows.
    """
    memory = _exact(A)[:0]
    for update in history:
        S, _, _ = input_rows(update, memory)
        _, singular, directions = torch.linalg.svd(_outside(S, memory), full_matrices=False)
        spanned = (S @ memory.T).square().sum() + singular.square().cumsum(0) - singular.square()  # without each one
        memory = torch.cat([memory, directions[spanned < energy * S.square().sum()]])
    held = [LowRank(memory, A.new_zeros(0, len(memory)))] if len(memory) else []
    return inputs_start(A, held, inputs) / math.sqrt(3)


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
