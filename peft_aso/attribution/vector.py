"""What attribution returns: one number per neuron and example (Eq. 10-12), with the names of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Layout = list[tuple[str, int, int]]

# the largest exponent that a value may reach, a little below log(3.4e38), the end of float32
_LOG_CEILING = 80.0


class LayerScores(NamedTuple):
    """Eq. 11 for one layer: `values * exp(log_scale)`, float64 `(B, size)` and `(B,)`; and the nodes per example."""

    values: torch.Tensor
    log_scale: torch.Tensor
    nodes: float


@dataclass
class AttributionVector:
    """Integrated gradients of P(y* given x) for every FFN neuron of a model, one row per example (Eq. 10-12).

    A long answer has a probability far below the smallest float32, so scores are stored apart from their scale:
    `values * exp(log_scale)` is Eq. 11. The scale is one positive number per example for all neurons, hence
    every rank, sign and cosine of `values` is that of the scores themselves.

    Attributes:
        values: float32 `(batch, N)`, Eq. 11 divided by `exp(log_scale)`.
        log_probability: float32 `(batch,)`, log P(y* given x) of the unscaled model (Eq. 9).
        log_scale: float32 `(batch,)`, the log of what `values` were divided by: `log_probability`, or more
            where some scaled model finds the answer so much likelier that float32 would overflow.
        layout: `(module name, start, stop)` for each layer in order; module names are relative to the
            transformers model, without wrappers such as PEFT's.
        nodes: at how many nodes of the path (Eq. 10) the gradient was taken, mean over layers and examples.
    """

    values: torch.Tensor
    log_probability: torch.Tensor
    log_scale: torch.Tensor
    layout: Layout
    nodes: float = 0.0

    @property
    def scores(self) -> torch.Tensor:
        """Eq. 11 as written, float32 `(batch, N)`; underflows to 0 where the answer's probability does."""
        scale = torch.exp(float64(self.log_scale))
        return (float64(self.values) * scale[:, None]).to(device=self.values.device, dtype=torch.float32)

    def layer(self, name: str) -> torch.Tensor:
        """The columns of `values` that belong to module `name`, `(batch, size)`; KeyError if it is not in layout."""
        for known, start, stop in self.layout:
            if known == name:
                return self.values[:, start:stop]
        raise KeyError(f"no layer called {name!r} in this attribution vector; its layout is {self.layout}")

    def mean_vector(self) -> torch.Tensor:
        """The mean over examples of Eq. 11, float32 `(N,)`, up to one positive factor.

        It is divided by the largest `exp(log_scale)`, so that it is not zero when every answer is long. Ranks, cosine
        and Pearson are those of the mean.
        """
        scale = float64(self.log_scale)
        weights = torch.exp(scale - scale.max())
        return (float64(self.values) * weights[:, None]).mean(0).to(device=self.values.device, dtype=torch.float32)

    def examples(self, rows: torch.Tensor) -> AttributionVector:
        """The vector of these examples, `(E,)`."""
        rows = rows.to(self.values.device)
        return AttributionVector(
            self.values[rows], self.log_probability[rows], self.log_scale[rows], self.layout, self.nodes
        )

    def __len__(self) -> int:
        return self.values.shape[0]

    def scores_by_layer(self) -> dict[str, LayerScores]:
        """Module name -> its scores, as `assemble` takes them."""
        values, log_scale = float64(self.values), float64(self.log_scale)
        return {name: LayerScores(values[:, start:stop], log_scale, self.nodes) for name, start, stop in self.layout}

    @staticmethod
    def cat(vectors: Sequence[AttributionVector]) -> AttributionVector:
        """Examples of several batches in one vector; ValueError if none are given or the layouts differ."""
        if not vectors:
            raise ValueError("Nothing to concatenate: give at least one AttributionVector.")
        first = vectors[0]
        if any(vector.layout != first.layout for vector in vectors):
            raise ValueError(
                "The attribution vectors are of different models, as their layouts differ. Concatenate vectors of one "
                "base model, computed with the same `neurons`."
            )
        device = first.values.device
        return AttributionVector(
            torch.cat([vector.values.to(device) for vector in vectors]),
            torch.cat([vector.log_probability.to(device) for vector in vectors]),
            torch.cat([vector.log_scale.to(device) for vector in vectors]),
            first.layout,
            sum(len(vector) * vector.nodes for vector in vectors) / max(1, sum(map(len, vectors))),
        )


def assemble(scores: dict[str, LayerScores], log_probability: torch.Tensor) -> AttributionVector:
    """Eq. 12: the scores of all layers, by module name, in one vector.

    The common scale is P(y* given x) of the unscaled model, raised for an example whose values would overflow float32.

    Args:
        log_probability: float64 `(B,)`.

    Raises:
        ValueError: NaN or Inf in the scores.
    """
    log_scale, layout = log_probability.clone(), Layout()
    for name, (values, log_size, _) in scores.items():
        if not (values.isfinite().all() and log_size.isfinite().all()):
            raise ValueError(
                f"The attribution of {name} has NaN or Inf. Check the model's weights, and use float32 or bfloat16 "
                "where float16 overflows."
            )
        log_largest = values.abs().amax(1).log() + log_size  # -inf for zeros
        log_scale = torch.maximum(log_scale, log_largest.to(log_scale.device) - _LOG_CEILING)
        start = layout[-1][2] if layout else 0
        layout.append((name, start, start + values.shape[1]))
    log_scale = log_scale.float()  # what is stored is what values are divided by
    device = next(iter(scores.values())).values.device
    parts = [values * torch.exp(log_size - log_scale.to(log_size))[:, None] for values, log_size, _ in scores.values()]
    values = torch.cat([part.float().to(device) for part in parts], 1)
    nodes = sum(each.nodes for each in scores.values()) / len(scores)
    return AttributionVector(values, log_probability.float().to(device), log_scale.to(device), layout, nodes)


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, on the CPU where the device (MPS) has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
