"""How alike attribution vectors are (Eq. 13): Spearman's rank correlation, or Pearson's, or the cosine."""

from __future__ import annotations

import torch
from scipy.stats import rankdata

from .config import check_choice

METHODS = ("spearman", "pearson", "cosine")


def similarity(a: torch.Tensor, b: torch.Tensor, method: str = "spearman") -> torch.Tensor:
    """Correlation of vectors along the last dimension (Eq. 13), from -1 to 1.

    Args:
        a, b: `(..., N)`, any real dtype; the leading dimensions broadcast as torch's do.
        method: "spearman" (the paper's; equal values share their mean rank), "pearson" or "cosine".

    Returns:
        float64, the broadcast leading shape. A constant vector (for the cosine: a zero vector) has no order and
        gives 0.

    Raises:
        ValueError: unknown method, different lengths, an empty last dimension, NaN or Inf.
    """
    _check_lengths(a, b)
    first = normalized(a, method)
    return (first * normalized(b, method).to(first.device)).sum(-1).clamp(-1.0, 1.0)


def similarity_matrix(a: torch.Tensor, b: torch.Tensor | None = None, method: str = "spearman") -> torch.Tensor:
    """Correlation of each vector of `a` `(S, N)` with each of `b` `(T, N)`, float64 `(S, T)`; None: all pairs of `a`.

    Raises:
        ValueError: as `similarity`, and if `a` or `b` does not have two dimensions.
    """
    other = a if b is None else b
    if a.ndim != 2 or other.ndim != 2:
        raise ValueError(
            f"similarity_matrix compares (S, N) with (T, N), got {tuple(a.shape)} and {tuple(other.shape)}."
        )
    _check_lengths(a, other)
    first = normalized(a, method)
    second = first if b is None else normalized(b, method).to(first.device)
    return (first @ second.T).clamp(-1.0, 1.0)


def normalized(x: torch.Tensor, method: str = "spearman") -> torch.Tensor:
    """Vectors `(..., N)` whose dot products are their similarities: ranked, centred, divided by their norm.

    Vectors that are compared often are normalized once. float32 copies change a similarity by less than 1e-6.

    Returns:
        float64 `(..., N)`; zeros for a vector without an order, as in `similarity`.

    Raises:
        ValueError: unknown method, no or an empty last dimension, NaN or Inf.
    """
    check_choice("method", method, METHODS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"The vectors to compare are empty: their shape is {tuple(x.shape)}.")
    x = x.detach()
    device = x.device if x.device.type != "mps" else torch.device("cpu")  # no float64 there
    x = x.to(device).double()
    if not x.isfinite().all():
        raise ValueError("The vectors to compare have NaN or Inf. Check the model's weights and its precision.")
    if method == "spearman":
        ranks = rankdata(x.cpu().numpy(), axis=-1)  # 1 to N; equal values share their mean rank
        x = torch.from_numpy(ranks).to(device) - (x.shape[-1] + 1) / 2
    else:
        x = x / _or_one(x.abs().amax(-1, keepdim=True))  # so that no square overflows or underflows
        if method == "pearson":
            constant = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
            x = (x - x.mean(-1, keepdim=True)).masked_fill(constant, 0.0)
    return x / _or_one(x.norm(dim=-1, keepdim=True))


def _or_one(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _check_lengths(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape[-1:] != b.shape[-1:]:
        shapes = tuple(a.shape), tuple(b.shape)
        raise ValueError(f"The vectors to compare need the same length in the last dimension, got {shapes}.")
