"""Trapezoids on the path, halved where they do not add up.

Gradients at two nodes a < b say how much P should change between them, P itself says how much it did:

    (b - a) (P'(a) + P'(b)) / 2    against    P(b) - P(a)

Where the two differ by more than the tolerance, the gradient is taken in the middle too, or at the quarters if they
differ by much. In most layers P hardly moves and three nodes are enough; in the first and the last it jumps within a
small part of the path, wherever that is. What is not seen, as by any rule that looks at nodes alone: a rise and fall
of P that lies wholly between two of them.
"""

from __future__ import annotations

import torch

from .neurons import NeuronLayer
from .passes import Pass
from .replay import Recording
from .steps import Gradients, LayerScores, layer_gradients

# the narrowest interval that is divided, as a part of the tolerance: where P jumps more steeply, it is left at that
_NARROWEST = 1 / 16
# an interval that misses by so many tolerances is quartered: fewer rounds, for a tenth more nodes
_MUCH = 2


def refined(
    run: Pass,
    layer: NeuronLayer,
    recording: Recording,
    first: Gradients,
    tolerance: float,
    most: int,
    max_rows: int,
    skip: bool,
) -> LayerScores:
    """Eq. 11 for one layer of every example, from its gradients at the first nodes and at those that they ask for.

    Args:
        first: of every example of the batch, with the nodes 0 and 1 among them.
        tolerance: how much an interval may miss, as a part of the largest P that was met.
        most: nodes an example, beside the first. In half precision P itself is rough, and some intervals never add up.
        max_rows, skip: of `layer_gradients`.
    """
    known = _Known(first)
    while True:
        examples, nodes = known.wanted(tolerance, most)
        if not len(examples):
            return known.trapezoids()
        examples = examples.to(first.examples.device)
        known.add(layer_gradients(run, layer, recording, examples, nodes, max_rows, skip))


class _Known:
    """Gradients of one layer at all nodes so far, one entry a node; scalars on the CPU."""

    def __init__(self, first: Gradients) -> None:
        self.batch_size = len(first.examples)
        self.examples = torch.empty(0, dtype=torch.long)
        self.nodes = self.log_p = self.slopes = torch.empty(0, dtype=torch.float64)
        self.values: list[torch.Tensor] = []
        self.add(first)

    def add(self, found: Gradients) -> None:
        count = found.nodes.shape[1]
        flat = found.values.flatten(0, 1)
        self.examples = torch.cat([self.examples, found.examples.cpu().repeat_interleave(count)])
        self.nodes = torch.cat([self.nodes, found.nodes.flatten().cpu()])
        self.log_p = torch.cat([self.log_p, found.log_p.flatten().cpu()])
        self.slopes = torch.cat([self.slopes, flat.sum(1).cpu().double()])  # of log P
        self.values.append(flat)

    def largest(self) -> torch.Tensor:
        """The largest log P of each example, `(B,)`."""
        start = torch.full((self.batch_size,), -torch.inf, dtype=torch.float64)
        return start.scatter_reduce(0, self.examples, self.log_p, "amax")

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries at the left and at the right end of each interval."""
        order = (2 * self.examples + self.nodes).argsort()
        left, right = order[:-1], order[1:]
        inside = self.examples[left] == self.examples[right]
        return left[inside], right[inside]

    def missed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The intervals' left and right ends, and by how much of the largest P each misses."""
        left, right = self.intervals()
        p = torch.exp(self.log_p - self.largest()[self.examples])
        slopes = p * self.slopes
        trapezoids = (self.nodes[right] - self.nodes[left]) * (slopes[left] + slopes[right]) / 2
        return left, right, (trapezoids - (p[right] - p[left])).abs()

    def wanted(self, tolerance: float, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Examples `(E,)` and the nodes `(E, K)` to add, the worst intervals first; none where every interval adds up.

        Examples that want fewer than others have one of theirs repeated, so that all run as one batch. What an example
        gets does not depend on its neighbours.
        """
        left, right, missed = self.missed()
        start, width = self.nodes[left], self.nodes[right] - self.nodes[left]
        room = [most - count for count in self.examples.bincount(minlength=self.batch_size).tolist()]
        wanted: dict[int, list[float]] = {}
        wrong = ((missed > tolerance) & (width > _NARROWEST * tolerance)).nonzero()[:, 0]
        for at in wrong[missed[wrong].argsort(descending=True, stable=True)].tolist():
            example = int(self.examples[left[at]])
            own = wanted.get(example, [])
            parts = (1, 2, 3) if missed[at] > _MUCH * tolerance else (2,)
            if len(own) + len(parts) <= room[example]:
                wanted[example] = own + [float(start[at] + width[at] * part / 4) for part in parts]
        if not wanted:
            return torch.empty(0, dtype=torch.long), torch.empty(0, 0)
        count = max(len(nodes) for nodes in wanted.values())
        filled = [nodes + nodes[:1] * (count - len(nodes)) for nodes in wanted.values()]
        return torch.tensor(list(wanted)), torch.tensor(filled, dtype=torch.float64)

    def trapezoids(self) -> LayerScores:
        """The sum of Eq. 11 with trapezoids between all nodes."""
        left, right = self.intervals()
        half = (self.nodes[right] - self.nodes[left]) / 2
        weights = torch.zeros_like(self.nodes).index_add_(0, left, half).index_add_(0, right, half)
        log_size = self.largest()
        share = torch.exp(self.log_p - log_size[self.examples]) * weights
        values = torch.cat(self.values)
        wide = torch.float64 if values.device.type != "mps" else torch.float32
        found = []
        for example in range(self.batch_size):
            own = (self.examples == example).nonzero()[:, 0]
            theirs = values[own.to(values.device)].to(wide)
            found.append(share[own].to(theirs) @ theirs)
        scores = torch.stack(found)
        return LayerScores(scores, log_size.to(scores.device), nodes=len(self.nodes) / self.batch_size)
