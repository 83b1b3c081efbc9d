"""Low-rank updates of one module, and the ways to merge several tasks' updates into one (Eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class LowRank:
    """One adapter's update of one module, `scale * B @ A`.

    Attributes:
        A: `(r, in)`, the weight of `lora_A`: the paper's A_t transposed (convolutions flattened).
        B: `(out, r)`, the weight of `lora_B`.
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        inputs: `(k, in)` float16, the input directions that the task stores: row i is sqrt(value_i) times the i-th
            leading eigenvector of the second moment C_t of its inputs, which is scaled to the trace `in`. None: none.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0
    inputs: torch.Tensor | None = None

    def to(self, *args: Any) -> LowRank:
        """All tensors with another device or dtype, as `Tensor.to`."""
        inputs = None if self.inputs is None else self.inputs.to(*args)
        return LowRank(self.A.to(*args), self.B.to(*args), self.scale, inputs)

    def delta(self) -> torch.Tensor:
        """`(out, in)`: scale * B A."""
        return self.scale * self.B @ self.A


class MissingInputsError(ValueError):
    """A start, penalty or merge needs the input directions of an earlier task, which stores none."""


def input_rows(update: LowRank, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C_t = S^T S + rest (I - U^T U), from the input directions that a task stores.

    Returns:
        S `(k, in)`, its rows U as unit vectors, and the scalar `rest`, the mean energy of the other directions, with
        the dtype and device of another tensor.

    Raises:
        MissingInputsError: the task stores none.
    """
    if update.inputs is None:
        raise MissingInputsError(
            "An earlier task stores no input directions for a module. Set input_directions=32 in its ASOLoraConfig "
            "before it trains, or call peft_aso.update_input_memory(model, batches) with some of its data."
        )
    S = update.inputs.to(like)
    norms = S.norm(dim=1, keepdim=True)
    rest = (S.shape[1] - norms.square().sum()).clamp(min=0) / max(1, S.shape[1] - len(S))
    return S, S / norms.clamp(min=torch.finfo(S.dtype).tiny), rest


def second_moment(update: LowRank, like: torch.Tensor) -> torch.Tensor:
    """C_t `(in, in)`, of trace `in`, as far as the task stores it, with the dtype and device of another tensor.

    Raises:
        MissingInputsError: the task stores none.
    """
    S, U, rest = input_rows(update, like)
    return S.T @ S - rest * U.T @ U + rest * torch.eye(S.shape[1], dtype=S.dtype, device=S.device)


Merge = Callable[..., LowRank]
MERGES: dict[str, Merge] = {}
"""The registered ways to merge tasks, by name."""
_NEED_INPUTS: set[str] = set()
_NEED_PSI: set[str] = set()


def register_merge(name: str, needs_inputs: bool = False, needs_psi: bool = False) -> Callable[[Merge], Merge]:
    """Register a way to merge tasks under a name that `ASOLoraConfig(merge=...)` takes.

    It is a function `(updates, psi=None) -> update` of one module: the tasks' updates, oldest first, and psi `(T, T)`,
    float64, with the soft coefficient of task t to the earlier task s in row t and column s (None: 1).

    Args:
        needs_inputs: the function reads the input directions that the tasks store.
        needs_psi: it reads psi, which tasks without a penalty compute for it.
    """

    def register(function: Merge) -> Merge:
        MERGES[name] = function
        if needs_inputs:
            _NEED_INPUTS.add(name)
        if needs_psi:
            _NEED_PSI.add(name)
        return function

    return register


def merge_needs_inputs(merge: object) -> bool:
    """Whether a value of `merge` names a way that reads the tasks' input directions."""
    return isinstance(merge, str) and merge in _NEED_INPUTS


def merge_needs_psi(merge: object) -> bool:
    """Whether a value of `merge` names a way that reads psi."""
    return isinstance(merge, str) and merge in _NEED_PSI


@register_merge("sum")
def sum_updates(updates: Sequence[LowRank], psi: torch.Tensor | None = None) -> LowRank:
    """sum_t scale_t B_t A_t (Eq. 3) as one update of rank sum_t r_t: A stacked, scale_t * B_t side by side, exactly.

    The dtype is the updates' own.
    """
    A = torch.cat([update.A for update in updates], dim=0)
    B = torch.cat([update.B * update.scale for update in updates], dim=1)
    return LowRank(A, B, 1.0)


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_t weight_t scale_t B_t A_t: the tasks weighted by hand."""
    return sum_updates([replace(each, scale=each.scale * w) for each, w in zip(updates, weights, strict=True)])


@register_merge("running_mean")
def running_mean(updates: Sequence[LowRank], psi: torch.Tensor | None = None) -> LowRank:
    """M_i = M_{i-1} + (S_i - M_{i-1}) / sqrt(i), where S_i is the sum of the first i tasks.

    The time-aware rule of SLAO (Qiao and Mahdavi, ICLR 2026), which merges one adapter that is trained on; on a chain,
    what was trained until task i is the sum S_i.
    """
    weights = [0.0] * len(updates)
    for i in range(1, len(updates) + 1):
        trained = [1.0] * i + [0.0] * (len(updates) - i)
        weights = [old + (new - old) / math.sqrt(i) for old, new in zip(weights, trained, strict=True)]
    return weighted_sum(updates, weights)


@register_merge("outside")
def outside_outputs(updates: Sequence[LowRank], psi: torch.Tensor | None = None) -> LowRank:
    """Each B without its part in the span of the earlier tasks' B: later tasks write into other output directions.

    Where LoRA updates share directions, B shares them (Tang and Yang, "Crowded in B-Space", 2026). What is left of a
    task shrinks with the number of earlier ones; with `out` earlier directions it is nothing.
    """
    changed: list[LowRank] = []
    for update in updates:
        B = update.B
        if changed:
            earlier = torch.cat([each.B for each in changed], dim=1)
            left, values, _ = torch.linalg.svd(earlier, full_matrices=False)
            basis = left[:, values > values.max() * max(earlier.shape) * torch.finfo(torch.float32).eps]
            B = B - basis @ (basis.T @ B)
        changed.append(replace(update, B=B))
    return sum_updates(changed)


@register_merge("magnitude")
def largest_magnitude(updates: Sequence[LowRank], psi: torch.Tensor | None = None) -> LowRank:
    """Each weight's change as it was largest in magnitude after one of the tasks: MagMax (Marczak et al., ECCV 2024).

    The change after task i is the sum of the first i tasks. The result has full rank, min(out, in), and costs a
    singular value decomposition of each module; `export_lora(max_rank=...)` makes it smaller.
    """
    after = torch.stack([update.delta() for update in updates]).cumsum(0)
    chosen = after.gather(0, after.abs().argmax(0, keepdim=True))[0]
    left, values, right = torch.linalg.svd(chosen, full_matrices=False)
    return LowRank(right, left * values)


@register_merge("regmean", needs_inputs=True)
def regression_mean(updates: Sequence[LowRank], psi: torch.Tensor | None = None, *, ridge: float = 0.01) -> LowRank:
    """The update that is closest, on each task's inputs, to the model as it stood after that task.

    RegMean (Jin et al., ICLR 2023) on a chain: the least-squares solution (sum_t S_t C_t) (sum_t C_t)^-1, with S_t the
    sum of the first t tasks and C_t the second moment of task t's inputs. Each A_t becomes
    A_t (sum_{s>=t} C_s) (sum_s C_s)^-1: task t acts on its own inputs and later ones', not on earlier ones'. The rank
    is that of the sum.

    Args:
        ridge: added to the diagonal of each C_t, whose mean is 1.

    Raises:
        MissingInputsError: a task stores no input directions.
    """
    moments = _moments(updates, ridge)
    rows = [update.A @ torch.stack(moments[t:]).sum(0) for t, update in enumerate(updates)]
    A = torch.linalg.solve(torch.stack(moments).sum(0), torch.cat(rows), left=False)
    return replace(sum_updates(updates), A=A)


@register_merge("soft_regmean", needs_inputs=True, needs_psi=True)
def soft_regression_mean(
    updates: Sequence[LowRank], psi: torch.Tensor | None = None, *, ridge: float = 0.01
) -> LowRank:
    """`regmean`, softly: a task may act on an earlier task's inputs as far as the two share knowledge neurons (Eq. 6).

    In the inverse, C_s of each task s < t is weighted by psi_ts^2: psi = 1 is `regmean`, psi = 0 the sum. Arguments
    and errors as there.
    """
    moments = _moments(updates, ridge)
    changed = []
    for t, update in enumerate(updates):
        own = torch.stack(moments[t:]).sum(0)
        weights = torch.ones(t) if psi is None else psi[t, :t] ** 2
        total = sum((float(w) * moment for w, moment in zip(weights, moments[:t], strict=True)), own)
        changed.append(replace(update, A=torch.linalg.solve(total, update.A @ own, left=False)))
    return sum_updates(changed)


def _moments(updates: Sequence[LowRank], ridge: float) -> list[torch.Tensor]:
    like = updates[0].A
    identity = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return [second_moment(update, like) + ridge * identity for update in updates]


def merge_function(merge: str | Mapping[str, float], tasks: Sequence[str]) -> Merge:
    """The function of a value of `merge`: a registered name, or the weight of each task.

    Args:
        tasks: names of the tasks whose updates the function will get.

    Raises:
        ValueError: a name that is not registered, or a task without a weight.
    """
    if isinstance(merge, str):
        if merge not in MERGES:
            raise ValueError(f"merge={merge!r} is none of {', '.join(map(repr, MERGES))}, nor one weight a task.")
        return MERGES[merge]
    if missing := [task for task in tasks if task not in merge]:
        raise ValueError(f"merge={dict(merge)} has no weight for {', '.join(missing)}. Give one for each task.")
    weights = [float(merge[task]) for task in tasks]
    return lambda updates, psi=None: weighted_sum(updates, weights)
