"""The orthogonality penalty (Eq. 4-7) and its gradient's way, on plain tensors.

The rows of `lora_A.weight` span a task's subspace: with the paper's A_t = `lora_A[t].weight.T`, the product
A_t^T A_T of Eq. 4 is `lora_A[t].weight @ lora_A[T].weight.T`. All modules of one shape are handled in one
batched product; the history's rows never change, so they are stacked once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass
class FrozenGroup:
    """The history's rows in all modules that share one shape.

    Attributes:
        modules: names of the M modules.
        rows: `(M, R, in)`, float32: the A rows of all earlier tasks, one below the other.
        tasks: `(M, R)`, int64: to which earlier task (0-based) each row belongs.
    """

    modules: list[str]
    rows: torch.Tensor
    tasks: torch.Tensor


def group_history(
    history: Mapping[str, Sequence[tuple[int, torch.Tensor]]], current: Mapping[str, torch.Tensor]
) -> list[FrozenGroup]:
    """Stack the history's rows by shape.

    Args:
        history: module -> `(task, A)` pairs, A of shape `(r_t, in)`; tasks count from 0.
        current: module -> A of the current task, `(r_T, in)`.

    Returns:
        Groups over the modules that both sides have. Modules without history are left out.

    Raises:
        ValueError: the input sizes of two adapters at one module differ.
    """
    buckets: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for module, matrix in current.items():
        pairs = history.get(module, ())
        for task, rows in pairs:
            if rows.shape[1] != matrix.shape[1]:
                raise ValueError(
                    f"{module}: the current adapter has inputs of size {matrix.shape[1]}, earlier task "
                    f"{task} of size {rows.shape[1]}. They were made for different base models."
                )
        if pairs:
            ranks = sum(rows.shape[0] for _, rows in pairs)
            buckets[(ranks, matrix.shape, matrix.device)].append(module)
    groups = []
    for modules in buckets.values():
        device = current[modules[0]].device
        stacked = [torch.cat([rows.detach().float().to(device) for _, rows in history[m]]) for m in modules]
        tasks = [[task for task, rows in history[m] for _ in range(rows.shape[0])] for m in modules]
        groups.append(FrozenGroup(modules, torch.stack(stacked), torch.tensor(tasks, device=device)))
    return groups


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
        current: module -> A of the current task, `(r_T, in)`; gradients flow into it.
        psi: `(T,)`, one coefficient for each earlier task (Eq. 6), or `(T, L)`, one for each task and layer.
        form: `"squared"` (Eq. 7) or `"l1"`.
        layers: module -> layer (column of psi), needed when psi is `(T, L)`.

    Returns:
        A float32 scalar, computed in float32 also under autocast.

    Raises:
        ValueError: psi is `(T, L)` and a module's layer is not in `layers`; or `form` is neither of the two.
    """
    if form not in ("squared", "l1"):
        raise ValueError(f"penalty={form!r} is not known. Choose one of: squared, l1.")
    total = torch.zeros((), device=psi.device)
    for group in groups:
        rows_of_current = torch.stack([current[module].float() for module in group.modules])
        with torch.autocast(device_type=group.rows.device.type, enabled=False):
            products = torch.bmm(group.rows, rows_of_current.transpose(1, 2))  # (M, R, r_T)
        weighted = _row_weights(group, psi.float().to(products.device), layers).unsqueeze(-1) * products
        term = weighted.square().sum() if form == "squared" else weighted.abs().sum()
        total = total.to(term.device) + term
    return total


def _row_weights(group: FrozenGroup, psi: torch.Tensor, layers: Mapping[str, int] | None) -> torch.Tensor:
    """psi of each row of the group, `(M, R)`."""
    if psi.dim() == 1:
        return psi[group.tasks]
    unplaced = [module for module in group.modules if module not in (layers or {})]
    if layers is None or unplaced:
        raise ValueError(f"psi has one value a layer: say which layer these modules belong to: {unplaced}.")
    columns = torch.tensor([layers[module] for module in group.modules], device=psi.device)
    return psi[group.tasks, columns.unsqueeze(1)]


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
    rows = torch.cat([part.detach() for part in history]).double()
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    keep = singular > singular.max() * max(rows.shape) * torch.finfo(torch.float32).eps
    if int(keep.sum()) >= matrix.shape[1]:
        raise ValueError(
            f"project_init: the history's rows span all {matrix.shape[1]} input dimensions of a module; "
            "nothing is left for a new task. Use smaller ranks, or leave project_init off."
        )
    basis = basis[keep]
    source = matrix.detach().double()
    return (source - source @ basis.T @ basis).to(matrix.dtype)
