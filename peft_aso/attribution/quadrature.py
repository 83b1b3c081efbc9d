"""Where on the path from zero to the neurons' values gradients are taken, and with what weights (Eq. 10)."""

from __future__ import annotations

import numpy
import torch

RULES = ("riemann", "gauss_legendre")


def path(steps: int, rule: str = "riemann") -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes in (0, 1] and their weights, float64 `(steps,)` each.

    "riemann" is the paper's: k/m with weight 1/m, for k = 1..m. "gauss_legendre" integrates polynomials of
    degree 2m - 1 exactly, so that fewer steps reach the same integral.

    Raises:
        ValueError: steps below 1, or another rule.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is a whole number from 1 up, not {steps!r}")
    if rule == "riemann":
        nodes = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return nodes, torch.full_like(nodes, 1 / steps)
    if rule == "gauss_legendre":
        places, weights = numpy.polynomial.legendre.leggauss(steps)  # on [-1, 1]
        return torch.from_numpy(places + 1) / 2, torch.from_numpy(weights) / 2
    raise ValueError(f"quadrature is one of {', '.join(RULES)}, not {rule!r}")
