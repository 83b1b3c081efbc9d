"""Eq. 11 of some layers by a rule of quadrature: the same nodes for all, or as many as each needs."""

from __future__ import annotations

from .adaptive import refined
from .neurons import NeuronLayer
from .passes import Pass
from .quadrature import Path
from .replay import Recording
from .steps import Gradients, LayerScores, every_example, joined, layer_gradients, summed, sweep_gradients


def scores_of(
    run: Pass,
    layers: list[NeuronLayer],
    recording: Recording,
    rule: Path,
    max_rows: int,
    skip: bool,
    unscaled: dict[str, Gradients] | None = None,
) -> list[LayerScores]:
    """The scores of layers of one stack for every example; several layers share one sweep (sweep.py).

    Args:
        recording: an unscaled pass with the neurons of `layers`.
        max_rows, skip: of `layer_gradients`; a sweep is as large as it is.
        unscaled: layer name to the gradients at the rule's last node, where they are known already.
    """
    unscaled = unscaled or {}
    nodes = rule.nodes[:-1] if unscaled else rule.nodes
    if not len(nodes):
        first = [unscaled[layer.name] for layer in layers]
    elif len(layers) > 1:
        first = sweep_gradients(run, layers, recording, nodes)
    else:
        each = nodes.expand(run.batch_size, -1)
        first = [layer_gradients(run, layers[0], recording, every_example(run), each, max_rows, skip)]
    if unscaled and len(nodes):
        first = [joined(found, unscaled[layer.name]) for layer, found in zip(layers, first, strict=True)]
    if rule.tolerance is None:
        return [summed(found, rule.weights) for found in first]
    return [
        refined(run, layer, recording, found, rule.tolerance, rule.most, max_rows, skip)
        for layer, found in zip(layers, first, strict=True)
    ]
