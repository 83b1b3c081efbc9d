"""What has been computed so far, for some examples and some layers, until it is one attribution vector."""

from __future__ import annotations

import torch

from .neurons import NeuronLayer
from .steps import LayerScores
from .vector import AttributionVector, Layout, assemble


class Findings:
    """Scores of parts of a batch. Every example must be added once for each layer."""

    def __init__(self) -> None:
        self._scores: dict[str, list[tuple[torch.Tensor, LayerScores]]] = {}
        self._logs: dict[int, torch.Tensor] = {}
        self._nodes: list[tuple[int, float]] = []  # of how many examples, and how many in the mean

    def add(self, examples: torch.Tensor, layer: NeuronLayer, scores: LayerScores) -> None:
        """Scores of `layer` for the examples with these indices, `(E,)`."""
        self._scores.setdefault(layer.name, []).append((examples, scores))
        self._nodes.append((len(examples), scores.nodes))

    def add_log_probability(self, examples: torch.Tensor, values: torch.Tensor) -> None:
        """log P(y* given x) of the unscaled model for these examples, `(E,)`; what is there already stays."""
        for example, value in zip(examples.tolist(), values, strict=True):
            self._logs.setdefault(example, value)

    def vector(self, layers: list[NeuronLayer]) -> AttributionVector:
        """The attribution vectors of all examples, `(B, N)`, layers in the order given.

        Raises:
            ValueError: NaN or Inf in the scores.
        """
        layout: Layout = []
        start = 0
        for layer in layers:
            layout.append((layer.name, start, start + layer.size))
            start += layer.size
        own = [self._of(layer) for layer in layers]
        logs = torch.stack([self._logs[example] for example in sorted(self._logs)])
        vector = assemble([part.values for part in own], [part.log_size for part in own], logs, layout)
        vector.nodes = sum(count * nodes for count, nodes in self._nodes) / sum(count for count, _ in self._nodes)
        return vector

    def _of(self, layer: NeuronLayer) -> LayerScores:
        """All examples' scores of one layer, in the batch's order."""
        parts = self._scores.pop(layer.name)
        order = torch.cat([examples for examples, _ in parts]).argsort().to(parts[0][1].values.device)
        values = torch.cat([scores.values for _, scores in parts])[order]
        log_size = torch.cat([scores.log_size for _, scores in parts])[order]
        if not (torch.isfinite(values).all() and torch.isfinite(log_size).all()):
            raise ValueError(
                f"attribution of {layer.name} has NaN or Inf: check the model's weights, and use float32 or "
                "bfloat16 where float16 overflows"
            )
        return LayerScores(values, log_size, parts[0][1].nodes)
