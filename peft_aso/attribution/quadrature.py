"""Where on the path from zero to the neurons' values gradients are taken, and with what weights (Eq. 10, 11)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch

RULES = ("riemann", "gauss_legendre", "adaptive")


@dataclass(frozen=True)
class Path:
    """Nodes in [0, 1] and their weights, float64 `(K,)` each.

    Attributes:
        tolerance: None for a rule that is the same for every layer and example. Else the nodes are only the first
            ones: intervals are halved where their trapezoid misses the change of P by more than this part of P
            (adaptive.py).
        most: how many nodes there may then be.
    """

    nodes: torch.Tensor
    weights: torch.Tensor
    tolerance: float | None = None
    most: int = 0


def path(steps: int, rule: str = "riemann") -> Path:
    """The nodes and weights of a rule.

    "riemann" is the paper's: k/m with weight 1/m, for k = 1..m. "gauss_legendre" integrates polynomials of
    degree 2m - 1 exactly. "adaptive" begins with two trapezoids, and halves them until none is wrong by more than 1/m,
    or there are 4m nodes.

    Raises:
        ValueError: steps below 1, or another rule.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is a whole number from 1 up, not {steps!r}")
    if rule == "riemann":
        nodes = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return Path(nodes, torch.full_like(nodes, 1 / steps))
    if rule == "gauss_legendre":
        places, weights = numpy.polynomial.legendre.leggauss(steps)  # on [-1, 1]
        return Path(torch.from_numpy(places + 1) / 2, torch.from_numpy(weights) / 2)
    if rule == "adaptive":
        nodes, weights = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.5, 0.25]], dtype=torch.float64)
        return Path(nodes, weights, tolerance=1 / steps, most=4 * steps)
    raise ValueError(f"quadrature is one of {', '.join(RULES)}, not {rule!r}")
