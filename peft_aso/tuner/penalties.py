"""Penalties that hold a new task's subspace orthogonal to those of earlier tasks (Eq. 4-7), registered by name.

The rows of `lora_A.weight` span a task's subspace: with the paper's A_t = `lora_A[t].weight.T`, the product A_t^T A_T
of Eq. 4 is `lora_A[t].weight @ lora_A[T].weight.T`.

A penalty is a function `(new, history, psi) -> scalar` of one module's low-rank factors; `total_penalty` sums it over
the modules. A penalty with a second function `batched` is computed for all modules of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .low_rank import LowRank, input_rows, weighted_sum

PenaltyFunction = Callable[[LowRank, Sequence[LowRank], torch.Tensor], torch.Tensor]
BatchedFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Penalty:
    """A registered penalty.

    Attributes:
        function: of the current task's factors, those of each earlier task, and their psi `(T,)` (Eq. 6); a scalar.
        default_weight: lambda where `ASOLoraConfig(penalty_weight=None)`.
        batched: the same for M modules of one shape: the current A `(M, r, in)`, the rows of all earlier tasks' A
            `(M, R, in)`, and psi of each row, `(M, R)` or `(1, R)`.
        needs_history: whether a first task has no penalty.
        needs_inputs: whether it reads the input directions that the earlier tasks store.
    """

    function: PenaltyFunction
    default_weight: float
    batched: BatchedFunction | None = None
    needs_history: bool = True
    needs_inputs: bool = False


PENALTIES: dict[str, Penalty] = {}


def register_penalty(
    name: str, default_weight: float = 0.5, batched: BatchedFunction | None = None, *, needs_history: bool = True,
    needs_inputs: bool = False,
) -> Callable[[PenaltyFunction], PenaltyFunction]:  # fmt: skip
    """Register a penalty under a name that `ASOLoraConfig(penalty=...)` takes. Arguments as in `Penalty`."""

    def register(function: PenaltyFunction) -> PenaltyFunction:
        PENALTIES[name] = Penalty(function, default_weight, batched, needs_history, needs_inputs)
        return function

    return register


def squared_batched(new: torch.Tensor, history: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
    """`squared` for modules of one shape, see `Penalty.batched`."""
    return (psi[:, None, :] * (new @ history.mT)).square().sum()


def l1_batched(new: torch.Tensor, history: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
    """`l1` for modules of one shape, see `Penalty.batched`."""
    return (psi[:, None, :] * (new @ history.mT)).abs().sum()


# The paper has 0.5 for both ("follow Wang et al."), which was tuned for the L1 form; for the squared form 0.05 was
# better on validation data (docs/results.md).
@register_penalty("squared", default_weight=0.05, batched=squared_batched)
def squared(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
    """sum_t sum_jk (psi_t (A_t^T A_T)[j,k])^2: the penalty of ASO-LoRA (Wang et al., ACL 2026, Eq. 5 and 7)."""
    return torch.stack(
        [(psi_t * (old.A @ new.A.T)).square().sum() for psi_t, old in zip(psi, history, strict=True)]
    ).sum()


@register_penalty("l1", default_weight=0.5, batched=l1_batched)
def l1(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
    """sum_t sum_jk |psi_t (A_t^T A_T)[j,k]|: the penalty of O-LoRA's code (Wang et al., EMNLP 2023), with psi."""
    return torch.stack(
        [(psi_t * (old.A @ new.A.T)).abs().sum() for psi_t, old in zip(psi, history, strict=True)]
    ).sum()


@register_penalty("inputs", default_weight=10.0, needs_inputs=True)
def inputs(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
    """sum_t psi_t^2 tr(A C_t A^T) / tr(C_t): how much of the earlier tasks' inputs, second moments C_t, A takes up.

    Eq. 5 with the inputs' own directions in place of A_t, which spans few of them. tr(C_t) is `in`.
    """
    A = new.A.float()
    taken = []
    for psi_t, old in zip(psi, history, strict=True):
        S, U, rest = input_rows(old, A)
        energy = (A @ S.T).square().sum() + rest * (A.square().sum() - (A @ U.T).square().sum())
        taken.append(psi_t**2 * energy)
    return torch.stack(taken).sum() / A.shape[1]


@register_penalty("outputs", default_weight=0.05)
def outputs(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
    """sum_t sum_jk (psi_t (B_t^T B)[j,k])^2: Eq. 5 on the columns of B, the directions that a task writes into."""
    return torch.stack(
        [(psi_t * (old.B.T @ new.B)).square().sum() for psi_t, old in zip(psi, history, strict=True)]
    ).sum()


@register_penalty("n_lora", default_weight=1e-5, needs_history=False)
def n_lora(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
    """sum_ij |scale (B A)_ij|: sparse updates collide rarely. N-LoRA (Yang et al., COLING 2025), on each task."""
    return new.delta().abs().sum()


@register_penalty("ella", default_weight=1.0)
def ella(new: LowRank, history: Sequence[LowRank], psi: torch.Tensor) -> torch.Tensor:
    """sum_ij (dW_ij W_ij)^2, with dW the new update and W the sum of the earlier ones, each times psi_t.

    ELLA (Das Biswas et al., EACL 2026): weights that earlier tasks have moved far are held. Makes a matrix of the
    module's size in each step.
    """
    past = weighted_sum(history, psi.tolist()).delta()
    return (new.delta() * past.to(new.A)).square().sum()


@dataclass(frozen=True)
class ModuleGroup:
    """The earlier tasks' factors in M modules that share their shapes, device and earlier tasks.

    Attributes:
        modules: names of the modules.
        tasks: `(T',)` indices of the earlier tasks that have weights there.
        history: for each module the factors of those tasks.
        rows: `(M, R, in)`, float32: the A of those tasks, one below the other.
        row_tasks: `(R,)`, the task of each row.
    """

    modules: list[str]
    tasks: torch.Tensor
    history: list[list[LowRank]]
    rows: torch.Tensor
    row_tasks: torch.Tensor


def group_modules(
    new: Mapping[str, LowRank], history: Mapping[str, Sequence[tuple[int, LowRank]]]
) -> list[ModuleGroup]:
    """Group modules by shape and copy the earlier tasks' A into one tensor a group.

    Args:
        new: module -> the current task's factors.
        history: module -> `(task, factors)` pairs, tasks counted from 0.

    Returns:
        Groups over the modules that both have.
    """
    buckets: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for module, update in new.items():
        pairs = history.get(module, ())
        if pairs:
            pattern = tuple((task, len(old.A)) for task, old in pairs)
            buckets[(pattern, update.A.shape, update.A.device)].append(module)
    groups = []
    for (pattern, _, device), modules in buckets.items():
        factors = [[old for _, old in history[module]] for module in modules]
        rows = torch.stack([torch.cat([old.A.to(device) for old in each]).float() for each in factors])
        tasks = torch.tensor([task for task, _ in pattern], device=device)
        ranks = torch.tensor([rank for _, rank in pattern], device=device)
        groups.append(ModuleGroup(modules, tasks, factors, rows, tasks.repeat_interleave(ranks)))
    return groups


def total_penalty(
    name: str,
    groups: Sequence[ModuleGroup],
    new: Mapping[str, LowRank],
    psi: torch.Tensor,
    layers: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """The registered penalty `name`, summed over modules (Eq. 7 without lambda).

    Args:
        groups: the history, from `group_modules`.
        new: module -> the current task's factors, in which gradients flow.
        psi: `(T,)`, one coefficient for each earlier task (Eq. 6), or `(T, L)`, one for each task and layer.
        layers: module -> layer (column of psi), needed if psi is `(T, L)`.

    Returns:
        A float32 scalar, also under autocast.
    """
    penalty = PENALTIES[name]
    terms = [] if penalty.needs_history else [penalty.function(update, [], psi[:0]) for update in new.values()]
    for group in groups if penalty.needs_history else ():
        device = group.rows.device
        by_module = psi.to(device)[:, None] if psi.dim() == 1 else psi.to(device)  # (T, 1) or (T, L)
        columns = [0 if psi.dim() == 1 or layers is None else layers[module] for module in group.modules]
        with torch.autocast(device.type, enabled=False):
            if penalty.batched is not None:
                current = torch.stack([new[module].A.float() for module in group.modules])
                terms.append(penalty.batched(current, group.rows, by_module[group.row_tasks][:, columns].T))
            else:
                for module, column, old in zip(group.modules, columns, group.history, strict=True):
                    terms.append(penalty.function(new[module], old, by_module[group.tasks, column]))
    home = psi.device
    return torch.stack([term.float().to(home) for term in terms]).sum() if terms else torch.zeros((), device=home)


def layers_of_modules(modules: Sequence[str], layout: Sequence[Sequence[Any]], count: int) -> dict[str, int]:
    """LoRA module -> the layer of the same block, for psi with one value a layer.

    Modules outside of all blocks belong to the nearest end: a head to the last layer, embeddings to the first.

    Args:
        modules: names of LoRA modules.
        layout: `[module, start, stop]` of each layer of the attribution vector; empty: the modules' own blocks.
        count: the number of values that psi has for each task.

    Raises:
        ValueError: `count` is not the number of layers.
    """
    blocks = list(dict.fromkeys(_block_of(name) for name in ([entry[0] for entry in layout] or modules)))
    if len(blocks) != count:
        raise ValueError(f"psi has {count} values a task, and the model has {len(blocks)} layers. Give one a layer.")
    found = {}
    for name in modules:
        inside = [index for index, block in enumerate(blocks) if f"{name}.".startswith(block)]
        head = any(part in name for part in ("head", "score", "classifier"))
        found[name] = inside[0] if inside else count - 1 if head else 0
    return found


def _block_of(name: str) -> str:
    """`"model.layers.3.mlp.down_proj"` -> `"model.layers.3."`: the name up to its first number."""
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) + "." if numbered else f"{name}."
