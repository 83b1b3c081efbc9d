"""Nodes on the path from zero to the neurons, their weights, and adaptive refinement (Eq. 10, 11)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch

from .config import AttributionConfig

# the narrowest interval that is divided, as a part of the tolerance
_NARROWEST = 1 / 16


@dataclass
class Samples:
    """Gradients of one layer at M nodes, in any order.

    Attributes:
        examples: int64 `(M,)` on the CPU, the example of each node.
        nodes: float64 `(M,)` on the CPU, in [0, 1]: what the layer's neurons n are scaled by.
        log_p: float64 `(M,)` on the CPU, log P(y* given x) there.
        gradients: `(M, size)`, n * d log P / dn there, summed over positions. Its sum over the neurons is the
            derivative of log P with respect to the node.
    """

    examples: torch.Tensor
    nodes: torch.Tensor
    log_p: torch.Tensor
    gradients: torch.Tensor

    def __post_init__(self) -> None:
        self.examples = self.examples.cpu()
        self.nodes, self.log_p = self.nodes.cpu().double(), self.log_p.detach().cpu().double()

    @staticmethod
    def cat(parts: list[Samples]) -> Samples:
        """The nodes of all parts."""
        names = ("examples", "nodes", "log_p", "gradients")
        return Samples(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def key(self) -> torch.Tensor:
        """Sorts the samples by example, and by node within each, `(M,)`."""
        return 2 * self.examples + self.nodes

    def largest_log_p(self) -> torch.Tensor:
        """The largest log P of each example, `(B,)`."""
        start = torch.full((int(self.examples.max()) + 1,), -torch.inf, dtype=torch.float64)
        return start.scatter_reduce(0, self.examples, self.log_p, "amax")


# examples (E,) and nodes (E, K) -> samples, E * K of them in parts
Gradients = Callable[[torch.Tensor, torch.Tensor], list[Samples]]


def nodes_and_weights(config: AttributionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes of a rule and their weights, float64 `(K,)` each; for "adaptive" the nodes that it starts from.

    "riemann" is Eq. 11: nodes k/m with weights 1/m. "gauss_legendre" integrates polynomials of degree 2m - 1 exactly.
    """
    m = config.steps
    if config.quadrature == "riemann":
        return torch.arange(1, m + 1, dtype=torch.float64) / m, torch.full((m,), 1 / m, dtype=torch.float64)
    if config.quadrature == "gauss_legendre":
        places, weights = numpy.polynomial.legendre.leggauss(m)  # on [-1, 1]
        return torch.from_numpy(places + 1) / 2, torch.from_numpy(weights) / 2
    nodes, weights = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.5, 0.25]], dtype=torch.float64)
    return nodes, weights


def refine(gradients: Gradients, samples: Samples, tolerance: float, most: int) -> tuple[Samples, torch.Tensor]:
    """Divide the intervals between nodes whose trapezoid misses the change of P, until none misses.

    For two neighbouring nodes a < b, (b - a) (P'(a) + P'(b)) / 2 should be P(b) - P(a). Where they differ by more than
    `tolerance` times the example's largest P, the gradient is taken in the middle as well, or at the three quarters
    where they differ by more than twice that. A bump of P that lies wholly between two nodes is not seen.

    Args:
        samples: of every example at the same first nodes, 0 and 1 among them.
        most: nodes an example. In half precision P itself is rough, and some intervals never add up.

    Returns:
        All samples, and the weights `(M,)` of the trapezoid rule.
    """
    while True:
        order = samples.key().argsort()
        same = samples.examples[order[:-1]] == samples.examples[order[1:]]
        left, right = order[:-1][same], order[1:][same]
        width = samples.nodes[right] - samples.nodes[left]

        p = torch.exp(samples.log_p - samples.largest_log_p()[samples.examples])
        slopes = p * samples.gradients.sum(1).cpu().double()
        missed = (width * (slopes[left] + slopes[right]) / 2 - (p[right] - p[left])).abs()

        free = most - samples.examples.bincount()
        wanted: dict[int, list[float]] = {}
        wrong = ((missed > tolerance) & (width > _NARROWEST * tolerance)).nonzero()[:, 0]
        for at in wrong[missed[wrong].argsort(descending=True, stable=True)].tolist():
            example, quarters = int(samples.examples[left[at]]), (1, 2, 3) if missed[at] > 2 * tolerance else (2,)
            nodes = wanted.get(example, [])
            if len(nodes) + len(quarters) <= free[example]:
                start = float(samples.nodes[left[at]])
                wanted[example] = nodes + [start + float(width[at]) * part / 4 for part in quarters]
        if not wanted:
            weights = torch.zeros_like(samples.nodes).index_add_(0, left, width / 2).index_add_(0, right, width / 2)
            return samples, weights
        # an example that wants fewer than the others repeats one: an interval without width weighs nothing
        count = max(map(len, wanted.values()))
        examples = sorted(wanted)
        filled = [wanted[each] + wanted[each][:1] * (count - len(wanted[each])) for each in examples]
        added = gradients(torch.tensor(examples), torch.tensor(filled, dtype=torch.float64))
        samples = Samples.cat([samples, *added])
