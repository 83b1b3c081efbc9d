"""The orthogonality penalty (Eq. 4-7) and its gradient, on plain tensors.

The rows of `lora_A.weight` span a task's subspace: with the paper's A_t = `lora_A[t].weight.T`, the product
A_t^T A_T of Eq. 4 is `lora_A[t].weight @ lora_A[T].weight.T`. Modules of one shape are handled in one batched
product, and the value's products give the gradient as well, so that a step reads the history once.

The history's rows lie in one block a group. Float32 parameters are moved into it: afterwards they are views of the
block, with the values that they had, so that nothing is held twice and a write through them is a write to the block.
Others are copied as far as `copy_bytes` goes, and what lies beyond is read where it is in every step, which is about
half as fast and takes no memory. (A Gram matrix sum_t psi_t^2 A_t A_t^T would be
smaller and faster still where the ranks sum to more than the inputs. But it is made anew whenever psi changes, serves
one form only, and loses the small values of nearly orthogonal rows to cancellation.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# On a CPU the copies pay little and memory is what is short; on an accelerator each product is a launch that costs
# more than its arithmetic.
COPY_BYTES = {"cpu": 64 << 20}
COPY_BYTES_ELSEWHERE = 1 << 30
# numbers of the history that go through both products while they are in a processor's cache, 2 MiB
_CHUNK = {"cpu": 1 << 19}
# so much may lie twice while parameters move, 16 MiB
_GIVE_BACK = 1 << 24
# up to so many rows in the history the product is faster with the current task's few rows on the left
_FEW_ROWS = 400


@dataclass
class FrozenGroup:
    """The history's rows in modules that share one shape, one device and the same earlier tasks at the same ranks.

    Attributes:
        modules: names of the M modules.
        tasks: `(R,)`, int64: to which earlier task (0-based) each row belongs.
        parts: for each module the A matrices of its earlier tasks, `(r_t, in)` each, as they lie in the adapters; R is
            the sum of their ranks.
        rows: `(M, R, in)`, float32: the same, one below the other; None where `parts` are read in place.
    """

    modules: list[str]
    tasks: torch.Tensor
    parts: list[list[torch.Tensor]]
    rows: torch.Tensor | None


def group_history(
    history: Mapping[str, Sequence[tuple[int, torch.Tensor]]],
    current: Mapping[str, torch.Tensor],
    copy_bytes: int | None = None,
    give_back: Callable[[], None] = lambda: None,
) -> list[FrozenGroup]:
    """Group the history's rows by shape, and bring them together in blocks.

    Float32 parameters that do not train are moved: their `data` become views of the block. Other tensors are copied as
    far as memory is granted.

    Args:
        history: module -> `(task, A)` pairs, A of shape `(r_t, in)`; tasks count from 0.
        current: module -> A of the current task, `(r_T, in)`.
        copy_bytes: what all copies on one device (moved parameters are none) may take together, in bytes. None:
            64 MiB on the CPU, 1 GiB on each accelerator.
        give_back: called now and then, when parameters have left their old places.

    Returns:
        Groups over the modules that both sides have. Modules without history are left out. Groups with `rows` hold
        copies: make them anew when the history changes.

    Raises:
        ValueError: the input sizes of two adapters at one module differ.
    """
    buckets: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    granted: dict[torch.device, int] = {}
    for module, matrix in current.items():
        pairs = history.get(module, ())
        if not pairs:
            continue
        _check_inputs(module, matrix, pairs)
        pattern = tuple((task, rows.shape[0]) for task, rows in pairs)
        device = matrix.device
        left = granted.get(device)
        if left is None:
            left = COPY_BYTES.get(device.type, COPY_BYTES_ELSEWHERE) if copy_bytes is None else copy_bytes
        needed = 4 * matrix.shape[1] * sum(rank for _, rank in pattern)
        copied = needed <= left
        moved = all(_movable(rows, device) for _, rows in pairs)
        granted[device] = left - needed if copied and not moved else left
        buckets[(pattern, matrix.shape, device, copied or moved)].append(module)
    return [_group(modules, history, key, give_back) for key, modules in buckets.items()]


def _movable(rows: torch.Tensor, device: torch.device) -> bool:
    """Whether `rows` can become a view of a block: a plain parameter of its dtype that does not train."""
    plain = type(rows) is torch.nn.Parameter and not rows.requires_grad and not rows.is_inference()
    return plain and rows.dtype == torch.float32 and rows.device == device and rows.dim() == 2


def _check_inputs(module: str, matrix: torch.Tensor, pairs: Sequence[tuple[int, torch.Tensor]]) -> None:
    for task, rows in pairs:
        if rows.shape[1] != matrix.shape[1]:
            raise ValueError(
                f"{module}: the current adapter has inputs of size {matrix.shape[1]}, earlier task "
                f"{task} of size {rows.shape[1]}. They were made for different base models."
            )


def _group(
    modules: list[str],
    history: Mapping[str, Sequence[tuple[int, torch.Tensor]]],
    key: tuple[Any, ...],
    give_back: Callable[[], None],
) -> FrozenGroup:
    """One group, of modules with the same key: task and rank of their earlier adapters, shape and device of the
    current A, and whether the rows come together in a block."""
    pattern, shape, device, copied = key
    tasks = torch.tensor([task for task, rank in pattern for _ in range(rank)], device=device)
    parts = [[rows for _, rows in history[module]] for module in modules]
    rows = None
    if copied:
        rows = torch.empty(len(modules), len(tasks), shape[1], device=device)
        often = max(1, _GIVE_BACK // max(rows[0].nbytes, 1))
        for index, (block, matrices) in enumerate(zip(rows, parts, strict=True), start=1):
            places = block.split([len(matrix) for matrix in matrices])
            for place, matrix in zip(places, matrices, strict=True):
                place.copy_(matrix)
                if _movable(matrix, device):
                    matrix.data = place
            if index % often == 0:
                give_back()
    return FrozenGroup(modules, tasks, [[matrix.detach() for matrix in matrices] for matrices in parts], rows)


def _stacked(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The parts one below the other, float32 `(R, in)` on `device`."""
    return torch.cat([part.to(device) for part in parts]).float()


def orthogonality_penalty(
    groups: Sequence[FrozenGroup],
    current: Mapping[str, torch.Tensor],
    psi: torch.Tensor,
    form: str = "squared",
    layers: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """sum_t sum_modules sum_jk (psi_t (A_t^T A_T)[j,k])^2 (Eq. 7 without lambda), or of absolute values.

    Args:
        groups: the history, from `group_history`.
        current: module -> A of the current task, `(r_T, in)`; gradients flow into it, once (no second derivative),
            and none into psi or the history.
        psi: `(T,)`, one coefficient for each earlier task (Eq. 6), or `(T, L)`, one for each task and layer. Read in
            each call.
        form: `"squared"` (Eq. 7) or `"l1"`.
        layers: module -> layer (column of psi), needed when psi is `(T, L)`.

    Returns:
        A float32 scalar, computed in float32 also under autocast. The gradient is that of the matrices as they were
        in this call.

    Raises:
        ValueError: psi is `(T, L)` and a module's layer is not in `layers`; or `form` is neither of the two.
    """
    if form not in ("squared", "l1"):
        raise ValueError(f"penalty={form!r} is not known. Choose one of: squared, l1.")
    psi = psi.detach().float().abs()  # the sign of psi is lost in both forms
    weights = [_row_weights(group, psi.to(group.tasks.device), layers) for group in groups]
    matrices = [current[module] for group in groups for module in group.modules]
    if not matrices:
        return torch.zeros((), device=psi.device)
    total: torch.Tensor = _Penalty.apply(groups, weights, form, torch.is_grad_enabled(), *matrices)  # type: ignore[no-untyped-call]
    return total.to(psi.device)


def _row_weights(group: FrozenGroup, psi: torch.Tensor, layers: Mapping[str, int] | None) -> torch.Tensor:
    """psi of each row of the group, `(M, R, 1)`, or `(1, R, 1)` when it is the same in all modules."""
    if psi.dim() == 1:
        return psi[group.tasks][None, :, None]
    unplaced = [module for module in group.modules if module not in (layers or {})]
    if layers is None or unplaced:
        raise ValueError(f"psi has one value a layer: say which layer these modules belong to: {unplaced}.")
    columns = torch.tensor([layers[module] for module in group.modules], device=psi.device)
    return psi[group.tasks, columns.unsqueeze(1)].unsqueeze(-1)


class _Penalty(torch.autograd.Function):
    """The penalty; its gradient is computed beside the value, and scaled by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Sequence[FrozenGroup],
        weights: Sequence[torch.Tensor],
        form: str,
        differentiable: bool,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[4:]
        ctx.needed, ctx.dtypes = needed, [matrix.dtype for matrix in matrices]
        total = torch.zeros((), device=matrices[0].device)
        gradients: list[torch.Tensor] = []
        start = 0
        for group, weight in zip(groups, weights, strict=True):
            stop = start + len(group.modules)
            wanted = differentiable and any(needed[start:stop])
            own = torch.stack([matrix.float() for matrix in matrices[start:stop]])
            with torch.autocast(device_type=own.device.type, enabled=False):
                value, gradient = _value_and_gradient(group, own, weight, form, wanted)
            total = total + value.to(total.device)
            gradients.append(gradient)
            start = stop
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The orthogonality penalty has no second derivative. Call backward without create_graph, or add the "
                "penalty's gradient in a backward of its own."
            )
        scaled = [part for block in ctx.saved_tensors for part in (block * above[0].to(block.device)).unbind()]
        each = zip(scaled, ctx.dtypes, ctx.needed, strict=True)
        return (None, None, None, None, *(part.to(dtype) if needed else None for part, dtype, needed in each))


def _value_and_gradient(
    group: FrozenGroup, matrices: torch.Tensor, weight: torch.Tensor, form: str, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A group's part of the penalty, and its gradient in `matrices` `(M, r_T, in)`; zeros if not wanted."""
    weights = weight.expand(len(matrices), -1, -1)
    if group.rows is None:
        parts = [
            _block(_stacked(rows, matrix.device)[None], matrix[None], own_weight[None], form, wanted)
            for rows, matrix, own_weight in zip(group.parts, matrices, weights, strict=True)
        ]
    else:
        size = max(1, _CHUNK.get(matrices.device.type, group.rows.numel()) // group.rows[0].numel())
        chunks = zip(group.rows.split(size), matrices.split(size), weights.split(size), strict=True)
        parts = [_block(*chunk, form, wanted) for chunk in chunks]
    return torch.stack([value for value, _ in parts]).sum(), torch.cat([gradient for _, gradient in parts])


def _block(
    rows: torch.Tensor, matrices: torch.Tensor, weight: torch.Tensor, form: str, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value for M modules, and the gradient `(M, r_T, in)`; zeros if not wanted.

    With P = A rows^T and W the row weights: sum (P W)^2 has the gradient 2 (P W^2) rows, and sum |P W| has
    (sign P W) rows.
    """
    if rows.shape[1] <= _FEW_ROWS:
        products = torch.bmm(matrices, rows.transpose(1, 2))  # (M, r_T, R)
    else:
        products = torch.bmm(rows, matrices.transpose(1, 2)).transpose(1, 2)
    weight = weight.transpose(1, 2)
    weighted = products * weight
    value = weighted.square().sum() if form == "squared" else weighted.abs().sum()
    if not wanted:
        return value, torch.zeros((), device=value.device).expand_as(matrices)
    slope = weighted.mul_(2 * weight) if form == "squared" else products.sign_().mul_(weight)
    return value, torch.bmm(slope, rows)


def norm_penalty(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the Frobenius norms of the current adapter's matrices: O-LoRA's second term (no lambda_2)."""
    norms = [torch.linalg.vector_norm(matrix.float()) for matrix in matrices]
    return torch.stack(norms).sum() if norms else torch.zeros(())


def project_out(matrix: torch.Tensor, history: Sequence[torch.Tensor]) -> torch.Tensor:
    """`matrix` `(r, in)` without its part in the span of the history's rows: A_t^T A_T = 0 for every t (Eq.
    4).

    Raises:
        ValueError: the history's rows span the whole input space, so that nothing is left.
    """
    return outside(exact(matrix), [(span(history), 1.0)]).to(matrix)


def span(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """An orthonormal basis `(k, in)`, float64, of what the rows of matrices `(r_t, in)` span.

    Raises:
        ValueError: they span the whole input space, so that nothing is left.
    """
    together = exact(torch.cat([part.detach() for part in rows]))
    _, singular, basis = torch.linalg.svd(together, full_matrices=False)
    keep = singular > singular.max() * max(together.shape) * torch.finfo(torch.float32).eps
    if int(keep.sum()) >= together.shape[1]:
        raise ValueError(
            f"project_init: the history's rows span all {together.shape[1]} input dimensions of a module; "
            "nothing is left for a new task. Use smaller ranks, or leave project_init off."
        )
    return basis[keep]


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where the device has no such numbers."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def outside(rows: torch.Tensor, spans: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """`rows` `(n, in)` without a part, from 0 to 1, of what lies in each span: x - p Q^T Q x, one after the other."""
    for basis, part in spans:
        basis = basis.to(rows)
        rows = rows - part * (rows @ basis.T) @ basis
    return rows
