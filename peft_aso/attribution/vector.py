"""What attribution gives back: one number per neuron and example (Eq. 10-12), with the names that go with
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Layout = list[tuple[str, int, int]]


@dataclass
class AttributionVector:
    """Integrated gradients of P(y* given x) for every FFN neuron of a model, one row per example (Eq. 10-12).

    A long answer has a probability far below the smallest float32, so scores are kept apart from their size:
    `values * exp(log_scale)` is Eq. 11. The scale is one positive number per example for all neurons, hence
    every rank, sign and cosine of `values` is that of the scores themselves.

    Attributes:
        values: float32 `(batch, N)`, Eq. 11 divided by `exp(log_scale)`.
        log_probability: float32 `(batch,)`, log P(y* given x) of the unscaled model (Eq. 9).
        log_scale: float32 `(batch,)`, the log of what `values` were divided by: `log_probability`, or more
            where some scaled model finds the answer so much likelier that float32 would overflow.
        layout: `(module name, start, stop)` for each layer in order; module names are relative to the
            transformers model, without wrappers such as PEFT's.
        nodes: at how many nodes of the path (Eq. 10) the gradient was taken, mean over layers and examples; None where
            the vector does not come from `integrated_gradients`.
    """

    values: torch.Tensor
    log_probability: torch.Tensor
    log_scale: torch.Tensor
    layout: Layout
    nodes: float | None = None

    def __post_init__(self) -> None:
        self.layout = [(str(name), int(start), int(stop)) for name, start, stop in self.layout]
        if self.values.ndim != 2:
            raise ValueError(f"values must be (batch, N), got shape {tuple(self.values.shape)}")
        batch = (self.values.shape[0],)
        for label, tensor in (("log_probability", self.log_probability), ("log_scale", self.log_scale)):
            if tuple(tensor.shape) != batch:
                raise ValueError(f"{label} must have shape {batch} to go with values, got {tuple(tensor.shape)}")
        position = 0
        for name, start, stop in self.layout:
            if start != position or stop <= start:
                raise ValueError(f"layout must be contiguous from 0: {name!r} is ({start}, {stop}) after {position}")
            position = stop
        if position != self.values.shape[1]:
            raise ValueError(f"layout covers {position} neurons but values have {self.values.shape[1]}")

    @property
    def scores(self) -> torch.Tensor:
        """Eq. 11 as written, float32 `(batch, N)`; underflows to 0 where the answer's probability does."""
        scale = torch.exp(float64(self.log_scale))
        return (float64(self.values) * scale[:, None]).to(device=self.values.device, dtype=torch.float32)

    def layer(self, name: str) -> torch.Tensor:
        """The columns of `values` that belong to module `name`, `(batch, size)`; KeyError if it is not in
        layout."""
        for known, start, stop in self.layout:
            if known == name:
                return self.values[:, start:stop]
        names = ", ".join(known for known, _, _ in self.layout[:4])
        raise KeyError(f"no layer called {name!r} in this attribution vector; its layout starts with {names}")

    def slices(self) -> dict[str, slice]:
        """Module name to the slice of columns that it owns, in the order of the layout."""
        return {name: slice(start, stop) for name, start, stop in self.layout}

    def check_layout(self, other: AttributionVector | Sequence[tuple[str, int, int]]) -> None:
        """Raise ValueError, saying what differs, unless `other` has the same neurons in the same order."""
        layout = other.layout if isinstance(other, AttributionVector) else list(other)
        if len(layout) != len(self.layout):
            raise ValueError(
                f"attribution vectors of different models: {len(self.layout)} layers here, {len(layout)} "
                "there; compare vectors of one base model, computed with the same `neurons=`"
            )
        for (name, start, stop), (name_there, start_there, stop_there) in zip(self.layout, layout, strict=True):
            if name != name_there or stop - start != stop_there - start_there:
                raise ValueError(
                    f"attribution vectors of different models: {name!r} with {stop - start} neurons here, "
                    f"{name_there!r} with {stop_there - start_there} there; compare vectors of one base "
                    "model, computed with the same `neurons=`"
                )

    def mean_vector(self) -> torch.Tensor:
        """The mean over examples of Eq. 11, `(N,)`, up to one positive factor.

        Scores are weighed against each other by their true sizes, but the mean is divided by the largest
        `exp(log_scale)`, so that it is not zero when every answer is long. Ranks, cosine and Pearson are the
        same.
        """
        scale = float64(self.log_scale)
        weights = torch.exp(scale - scale.max())
        return (float64(self.values) * weights[:, None]).mean(0).to(device=self.values.device, dtype=torch.float32)

    def to(self, device: torch.device | str) -> AttributionVector:
        """The same vector with its tensors on `device`."""
        return AttributionVector(
            self.values.to(device),
            self.log_probability.to(device),
            self.log_scale.to(device),
            list(self.layout),
            self.nodes,
        )

    def __len__(self) -> int:
        return self.values.shape[0]

    @staticmethod
    def cat(vectors: Sequence[AttributionVector]) -> AttributionVector:
        """Examples of several batches in one vector; ValueError if none are given or the layouts differ."""
        if not vectors:
            raise ValueError("nothing to concatenate: give at least one AttributionVector")
        first = vectors[0]
        for vector in vectors[1:]:
            first.check_layout(vector)
        device = first.values.device
        nodes, total = [vector.nodes for vector in vectors], sum(len(vector) for vector in vectors)
        return AttributionVector(
            torch.cat([vector.values.to(device) for vector in vectors]),
            torch.cat([vector.log_probability.to(device) for vector in vectors]),
            torch.cat([vector.log_scale.to(device) for vector in vectors]),
            list(first.layout),
            None if None in nodes else sum(len(each) * (each.nodes or 0) for each in vectors) / max(1, total),
        )


# the largest exponent that a value may reach, a little below log(3.4e38), the end of float32
_LOG_CEILING = 80.0


def assemble(
    parts: Sequence[torch.Tensor],
    log_sizes: Sequence[torch.Tensor],
    log_probability: torch.Tensor,
    layout: Layout,
) -> AttributionVector:
    """Layers computed apart, each `(batch, size)` float64 times its own `exp(log_size)`, in one vector.

    The common scale is P(y* given x) of the unscaled model, raised for a whole example if float32 would
    overflow.
    """
    log_scale = log_probability.clone()
    for part, log_size in zip(parts, log_sizes, strict=True):
        largest = part.abs().amax(dim=1)
        log_largest = torch.where(largest > 0, largest, torch.ones_like(largest)).log() + log_size
        needed = torch.where(largest > 0, log_largest - _LOG_CEILING, torch.full_like(largest, -math.inf))
        log_scale = torch.maximum(log_scale, needed)
    # the scale that is stored is the float32 one: divide by exactly that
    log_scale = log_scale.float().to(log_probability.dtype)
    values = [
        (part * torch.exp(log_size - log_scale)[:, None]).float()
        for part, log_size in zip(parts, log_sizes, strict=True)
    ]
    return AttributionVector(torch.cat(values, dim=1), log_probability.float(), log_scale.float(), layout)


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, on the CPU where the device (MPS) has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
