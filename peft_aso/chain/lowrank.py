"""Sums of low-rank products as one product, exactly or truncated, without ever forming the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Product(NamedTuple):
    """The matrix `up @ down` `(out, in)`, kept as its two factors in float64."""

    down: torch.Tensor  # (rank, in)
    up: torch.Tensor  # (out, rank)

    @property
    def rank(self) -> int:
        """Number of rows of `down`, an upper bound of the matrix's rank."""
        return int(self.down.shape[0])


def weighted_sum(parts: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> Product:
    """sum_t scale_t * up_t @ down_t as one product: ranks one after the other, each scale folded into `up`.

    Args:
        parts: `(down (r_t, in), up (out, r_t), scale_t)` of each task.
    """
    downs = [_exact(down) for down, _, _ in parts]
    ups = [_exact(up) * scale for _, up, scale in parts]
    return Product(torch.cat(downs, dim=0), torch.cat(ups, dim=1))


def _exact(matrix: torch.Tensor) -> torch.Tensor:
    """In float64, where it is; on the CPU where the device has no float64."""
    matrix = matrix.detach()
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def truncated(product: Product, rank: int) -> Product:
    """The best approximation of that rank in the Frobenius norm (Eckart-Young), by the SVD of a small core.

    With `up = Q_u R_u` and `down.T = Q_d R_d`, the product's singular values are those of `R_u R_d^T`, which
    is no larger than rank x rank. Each factor gets the square roots of the singular values.
    """
    if product.rank <= rank:
        return product
    q_up, r_up = torch.linalg.qr(product.up)
    q_down, r_down = torch.linalg.qr(product.down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    roots = values[:rank].sqrt()
    up = q_up @ left[:, : len(roots)] * roots
    down = roots.unsqueeze(1) * (right[: len(roots)] @ q_down.T)
    return Product(down, up)


def padded(product: Product, rank: int) -> Product:
    """The same matrix with factors of that rank: zeros are added."""
    more = rank - product.rank
    down = torch.nn.functional.pad(product.down, (0, 0, 0, more))
    return Product(down, torch.nn.functional.pad(product.up, (0, more)))


def norm(product: Product) -> float:
    """The Frobenius norm of `up @ down`."""
    r_up = torch.linalg.qr(product.up).R
    r_down = torch.linalg.qr(product.down.T).R
    return float(torch.linalg.matrix_norm(r_up @ r_down.T))


def distance(first: Product, second: Product) -> float:
    """The Frobenius norm of the difference of two products of the same shape."""
    down = torch.cat([first.down, second.down])
    return norm(Product(down, torch.cat([first.up, -second.up], dim=1)))
