"""How alike attribution vectors are (Eq. 13): Spearman's rank correlation, or Pearson's, or the cosine.

Each vector is ranked, centred and measured once (`prepare`); every comparison with it is then a product. Spearman's
ranks are kept as twice their distance from the mean rank: whole numbers below 2^24 in size, which float32 holds
exactly, ties included. Products and sums are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

METHODS = ("spearman", "pearson", "cosine")
# numbers in a temporary: 2 MiB in float64, which a processor's cache holds; accelerators want larger pieces
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 22
# vectors up to this length have doubled ranks that float32 holds exactly
_FLOAT32_RANKS = 1 << 23
# below this many numbers a thread costs more than it saves
_THREADED = 1 << 16


@dataclass(frozen=True)
class Prepared:
    """Vectors made ready for comparison, from `prepare`: w = (a.rows . b.rows) * a.scale * b.scale.

    Attributes:
        rows: `(..., N)`: doubled centred ranks, or centred values (the cosine: values).
        scale: float64 `(...)`, one over the norm of the rows; 0 where there is nothing to compare.
        method: the method that they were prepared for.
    """

    rows: torch.Tensor
    scale: torch.Tensor
    method: str


Vectors = torch.Tensor | Prepared


def average_ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks 1..N along the last dimension, equal values sharing the mean of their ranks.

    Args:
        x: `(..., N)`, any real dtype, without NaN.

    Returns:
        float64 `(..., N)`, as `scipy.stats.rankdata` gives for each vector.
    """
    return (_doubled_ranks(x).double() + (x.shape[-1] + 1)) / 2


def prepare(
    x: torch.Tensor, method: str = "spearman", dtype: torch.dtype = torch.float64, label: str = "x"
) -> Prepared:
    """Rank (or centre) and measure each vector once, so that each comparison is a product.

    Args:
        x: `(..., N)`, any real dtype.
        method: "spearman", "pearson" or "cosine".
        dtype: how Pearson's and the cosine's rows are kept. float32 halves the memory and changes a similarity by
            less than 2e-7. Ranks are float32 whatever is asked for, as they lose nothing by it (float64 beyond
            2^23 neurons).
        label: what error messages call `x`.

    Raises:
        ValueError: unknown method, no or an empty last dimension, NaN or Inf in `x`.
    """
    _check_method(method)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"vectors to compare are empty: `{label}` has shape {tuple(x.shape)}")
    x = x.detach()
    if x.device.type == "mps":  # no float64 there
        x = x.cpu()
    _check_finite(x, label)
    if method == "spearman":
        rows = _doubled_ranks(x)
    else:
        rows = torch.empty(x.shape, dtype=dtype, device=x.device)
        flat, into = x.reshape(-1, x.shape[-1]), rows.view(-1, x.shape[-1])
        for part in _row_chunks(flat):
            into[part] = _centred(flat[part].double(), method)
    norm = _dots(rows, rows).sqrt()
    return Prepared(rows, torch.where(norm > 0, 1 / norm, torch.zeros_like(norm)), method)


def similarity(a: Vectors, b: Vectors, method: str = "spearman") -> torch.Tensor:
    """Correlation of vectors along the last dimension (Eq. 13), from -1 to 1.

    Args:
        a, b: `(..., N)` tensors, or what `prepare` made of them; the leading dimensions broadcast, so one vector
            may meet many, and is ranked once. For many against many see `similarity_matrix`.
        method: "spearman" (the paper's; equal values share their mean rank), "pearson" or "cosine".

    Returns:
        float64, the broadcast leading shape. A vector that is constant (all zero, for the cosine) carries no
        order and gives 0, not NaN.

    Raises:
        ValueError: unknown method, shapes that do not fit, an empty last dimension, NaN or Inf in the input,
            vectors that were prepared for another method.
    """
    _check_method(method)
    shapes = _shapes(a, b)
    try:
        lead = torch.broadcast_shapes(shapes[0][:-1], shapes[1][:-1])
    except RuntimeError:
        raise ValueError(
            f"leading dimensions of the vectors to compare do not broadcast: {shapes[0]} and {shapes[1]}"
        ) from None
    first, second = _ready(a, "a", method), _ready(b, "b", method)
    rows, scale = second.rows.to(first.rows.device), second.scale.to(first.scale.device)
    size = rows.shape[-1]
    if 1 in (first.scale.numel(), scale.numel()):
        dots = _products(first.rows.reshape(-1, size), rows.reshape(-1, size)).reshape(lead)
    else:
        dots = _dots(first.rows, rows)
    return (dots * first.scale * scale).clamp(-1.0, 1.0)


def similarity_matrix(a: Vectors, b: Vectors | None = None, method: str = "spearman") -> torch.Tensor:
    """Correlation of each vector of `a` with each of `b` (Eq. 13): each is ranked once, and one product does the rest.

    Args:
        a: `(S, N)`, or what `prepare` made of it.
        b: `(T, N)` likewise; None: all pairs of `a`.
        method: as in `similarity`.

    Returns:
        float64 `(S, T)`; nothing larger than the vectors themselves is made on the way.

    Raises:
        ValueError: as `similarity`, and if `a` or `b` has not two dimensions.
    """
    _check_method(method)
    other = a if b is None else b
    shapes = _shapes(a, other)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2:
        raise ValueError(f"similarity_matrix compares (S, N) with (T, N), got {shapes[0]} and {shapes[1]}")
    first = _ready(a, "a", method)
    second = first if b is None else _ready(b, "b", method)
    rows, scale = second.rows.to(first.rows.device), second.scale.to(first.scale.device)
    return (_products(first.rows, rows) * first.scale[:, None] * scale).clamp(-1.0, 1.0)


# ---- checks ----------------------------------------------------------------------------------------------


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")


def _shapes(a: Vectors, b: Vectors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of both, which must agree in a last dimension that is not 0."""
    left, right = (tuple(x.rows.shape if isinstance(x, Prepared) else x.shape) for x in (a, b))
    if not left or not right or left[-1] != right[-1]:
        raise ValueError(f"vectors to compare need the same length in the last dimension, got {left} and {right}")
    if left[-1] == 0:
        raise ValueError("vectors to compare are empty: their last dimension is 0")
    return left, right


def _ready(x: Vectors, label: str, method: str) -> Prepared:
    if not isinstance(x, Prepared):
        return prepare(x, method, label=label)
    if x.method != method:
        raise ValueError(f"`{label}` was prepared for {x.method}: prepare it for {method} to compare it so")
    return x


def _check_finite(x: torch.Tensor, label: str) -> None:
    """The smallest and the largest number tell, without a mask of the size of `x`: NaN passes through both."""
    if x.numel() and x.is_floating_point() and not all(map(math.isfinite, map(float, x.aminmax()))):
        raise ValueError(f"NaN or Inf in the vectors given as `{label}`: check the model's weights and its precision")


# ---- products --------------------------------------------------------------------------------------------


def _chunk(rows: int, x: torch.Tensor) -> int:
    """How many columns (or rows) of `rows` numbers make a temporary of the right size on the device of `x`."""
    return _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // max(rows, 1)


def _row_chunks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of `(n, N)`."""
    step = max(1, _chunk(x.shape[1], x))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` in float64, `(S, T)`, some columns at a time: float32 rows are never widened as a whole."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    step = max(1024, _chunk(max(len(a), len(b)), a))
    for start in range(0, a.shape[1], step):
        left = a[:, start : start + step].double()
        right = left if b is a else b[:, start : start + step].double()
        total.addmm_(left, right.T)
    return total


def _dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums of products along the last dimension in float64, leading dimensions broadcast, some columns at a time."""
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    total = torch.zeros(lead, dtype=torch.float64, device=a.device)
    step = max(1024, _chunk(math.prod(lead), a))
    for start in range(0, a.shape[-1], step):
        left = a[..., start : start + step].double()
        right = left if b is a else b[..., start : start + step].double()
        total += (left * right).sum(-1)
    return total


def _centred(x: torch.Tensor, method: str) -> torch.Tensor:
    """Rows whose products are Pearson's correlations (the cosines) once their norms are divided out, float64.

    Brought to a largest value of 1 before anything is squared, so that neither tiny nor huge entries leave float64.
    """
    if method == "cosine":
        return _to_size_1(x)
    flat = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    x = _to_size_1(x)
    return _to_size_1(torch.where(flat, torch.zeros_like(x), x - x.mean(-1, keepdim=True)))


def _to_size_1(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    return x / torch.where(largest > 0, largest, torch.ones_like(largest))


# ---- ranks -----------------------------------------------------------------------------------------------


def _doubled_ranks(x: torch.Tensor) -> torch.Tensor:
    """`2 * rank - (N + 1)` along the last dimension, `(..., N)`: whole numbers that sum to 0.

    float32, where they are exact, up to 2^23 neurons, else float64.
    """
    size = x.shape[-1]
    dtype = torch.float32 if size <= _FLOAT32_RANKS else torch.float64
    ranks = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        flat, into = x.detach().reshape(-1, size), ranks.view(-1, size)
        if x.device.type == "cpu":
            _rank_rows(flat, into.numpy())
        else:
            for part in _row_chunks(flat):
                into[part] = _ranks_by_torch(flat[part]).to(dtype)
    return ranks


def _rank_rows(x: torch.Tensor, into: np.ndarray) -> None:
    """`_rank_row` of each row, on as many threads as torch uses (numpy's sorting runs outside Python's lock)."""
    rows = _sortable(x)
    places = np.arange(x.shape[1], dtype=np.int64)
    untied = (2 * places - (x.shape[1] - 1)).astype(into.dtype)
    workers = min(torch.get_num_threads(), len(rows)) if rows.size >= _THREADED else 1
    if workers == 1:
        for row, out in zip(rows, into, strict=True):
            _rank_row(row, places, untied, out)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda pair: _rank_row(pair[0], places, untied, pair[1]), zip(rows, into, strict=True)):
            pass  # raises what a thread raised


def _sortable(x: torch.Tensor) -> np.ndarray:
    """The same order in a dtype that `_rank_row` knows: float32, int32, or as it is."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    elif x.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        x = x.int()
    array: np.ndarray = x.numpy()
    return array


def _rank_row(row: np.ndarray, places: np.ndarray, untied: np.ndarray, out: np.ndarray) -> None:
    """The doubled centred ranks of one vector, written to `out`; `untied` are those of a vector in order.

    32-bit values travel through the sort in one word with their place, so that sorting whole numbers, which is
    several times faster than sorting for an order, gives both.
    """
    if row.dtype in (np.float32, np.int32):
        keys = _ordered_bits(row).astype(np.int64)
        keys <<= 32
        keys |= places
        keys.sort()
        ordered = keys >> 32
        keys &= 0xFFFFFFFF
        order = keys
    else:
        order = np.argsort(row)
        ordered = row[order]
    changes = ordered[1:] != ordered[:-1]
    if changes.all():
        out[order] = untied
        return
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    counts = np.diff(starts, append=len(row))
    # a run from `first` to `last`: twice its mean place is first + last
    out[order] = np.repeat((2 * starts + counts - len(row)).astype(out.dtype), counts)


def _ordered_bits(row: np.ndarray) -> np.ndarray:
    """int32 numbers in the order of `row`: the bits of positive floats are in order, of negative ones reversed."""
    if row.dtype == np.int32:
        return row
    bits = (row + np.float32(0)).view(np.int32)  # -0.0 + 0.0 is 0.0: equal values get equal bits
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _ranks_by_torch(x: torch.Tensor) -> torch.Tensor:
    """The doubled centred ranks of rows `(n, N)` on a device, as int64."""
    ordered, order = x.sort(dim=-1)
    size = x.shape[-1]
    place = torch.arange(size, device=x.device).expand(ordered.shape)
    changes = ordered[:, 1:] != ordered[:, :-1]
    doubled = 2 * place
    if not bool(changes.all()):
        edge = torch.ones_like(ordered[:, :1], dtype=torch.bool)
        opens, closes = torch.cat([edge, changes], -1), torch.cat([changes, edge], -1)
        # each run of equal values spreads its first place to the right and its last place to the left
        first = torch.where(opens, place, torch.zeros_like(place)).cummax(-1).values
        last = torch.where(closes, place, torch.full_like(place, size)).flip(-1).cummin(-1).values.flip(-1)
        doubled = first + last
    return torch.empty_like(doubled).scatter_(-1, order, doubled - (size - 1))
