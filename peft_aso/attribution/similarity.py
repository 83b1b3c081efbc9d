"""How alike two attribution vectors are (Eq. 13): Spearman's rank correlation, or Pearson's, or the
cosine."""

from __future__ import annotations

import torch

METHODS = ("spearman", "pearson", "cosine")


def average_ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks 1..N along the last dimension, equal values sharing the mean of their ranks.

    Args:
        x: `(..., N)`, any real dtype, without NaN.

    Returns:
        float64 `(..., N)`, as `scipy.stats.rankdata` gives for each vector.
    """
    ordered, order = x.sort(dim=-1)
    place = torch.arange(x.shape[-1], device=x.device).expand(ordered.shape)
    changes = ordered[..., 1:] != ordered[..., :-1]
    edge = torch.ones_like(ordered[..., :1], dtype=torch.bool)
    opens, closes = torch.cat([edge, changes], -1), torch.cat([changes, edge], -1)
    # each run of equal values spreads its first place to the right and its last place to the left
    first = torch.where(opens, place, torch.zeros_like(place)).cummax(-1).values
    last = torch.where(closes, place, torch.full_like(place, x.shape[-1])).flip(-1).cummin(-1).values.flip(-1)
    ranks = (first + last).double() / 2 + 1
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def similarity(a: torch.Tensor, b: torch.Tensor, method: str = "spearman") -> torch.Tensor:
    """Correlation of vectors along the last dimension (Eq. 13), from -1 to 1.

    Args:
        a, b: `(..., N)` tensors; the leading dimensions broadcast, so one vector may meet many, and is ranked
            once.
        method: "spearman" (the paper's; equal values share their mean rank), "pearson" or "cosine".

    Returns:
        float64, the broadcast leading shape. A vector that is constant (all zero, for the cosine) carries no
        order and gives 0, not NaN.

    Raises:
        ValueError: unknown method, shapes that do not fit, an empty last dimension, NaN or Inf in the input.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    _check_shapes(a, b)
    a, b = _prepared(a, "a", method), _prepared(b, "b", method)
    return (a * b.to(a.device)).sum(-1).clamp(-1.0, 1.0)


def _check_shapes(a: torch.Tensor, b: torch.Tensor) -> None:
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"vectors to compare need the same length in the last dimension, got {shapes}")
    if a.shape[-1] == 0:
        raise ValueError("vectors to compare are empty: their last dimension is 0")
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(f"leading dimensions of the vectors to compare do not broadcast: {shapes}") from None


def _prepared(x: torch.Tensor, label: str, method: str) -> torch.Tensor:
    """Unit vectors in float64 whose dot products are the correlations; zero where there is nothing to
    compare."""
    x = x.detach()
    if not torch.isfinite(x).all():
        raise ValueError(
            f"NaN or Inf in the vectors given as `{label}`: check the model's weights and its precision"
        )
    if x.device.type == "mps":  # no float64 there
        x = x.cpu()
    x = average_ranks(x) if method == "spearman" else x.double()
    flat = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    if method != "cosine":
        x = torch.where(flat, torch.zeros_like(x), _centred(x))
    # brought to a largest value of 1 before squaring, so that neither tiny nor huge entries leave float64
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def _centred(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    return x - x.mean(-1, keepdim=True)
