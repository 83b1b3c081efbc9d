"""Integrated gradients of an answer with respect to the FFN neurons, as in the paper (Eq. 8-12): the reference.

    Attr(n_i) = n_i * sum_k weight_k * dP/dn_i (node_k * n),    Eq. 11: node_k = k/m, weight_k = 1/m

The whole model runs for every layer and node. fast.py has the same numbers, two orders of magnitude faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..sharding import gathered
from .answer import forward_parameters, log_probability, read_batch
from .config import AttributionConfig
from .neurons import NeuronLayer, eval_mode, find_neurons, rows_that_fit, unwrap
from .quadrature import Gradients, Samples, nodes_and_weights, refine
from .vector import AttributionVector, LayerScores, assemble, float64


def integrated_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    config: AttributionConfig | None = None,
    *,
    progress: bool = False,
) -> AttributionVector:
    """Integrated gradients of P(y* given x) for every FFN neuron, one row per example (Eq. 8-12).

    Each layer's neurons at the answer's positions are scaled together, and the layers above follow. The model runs in
    eval mode; its training flags and the random state are restored.

    Args:
        model: a transformers model, or a wrapper of one (PEFT, torch.compile, DistributedDataParallel). The adapters
            that are active in it are part of it.
        batch: a collated batch with `labels`, -100 where there is no answer (see answer.py).
        config: `steps`, `quadrature`, `neurons`, `stacks`, `max_rows`, `max_answer_tokens`; None: the paper's right
            Riemann sum with 20 steps.
        progress: show a bar over layers while it runs.

    Returns:
        An `AttributionVector`: values `(batch, N)`, layers in the order of `named_modules()`.

    Raises:
        ValueError: a batch or a setting that does not fit the model (see `read_batch`, `find_neurons`); a layer that
            runs more than once in a forward pass, or never; NaN or Inf in the result.
    """
    config = config or AttributionConfig(quadrature="riemann")
    model = unwrap(model)
    layers = find_neurons(model, config.neurons, config.stacks)  # Eq. 8
    with gathered(model), eval_mode(model):
        read = read_batch(model, batch, config.max_answer_tokens)
        width = max(mask.shape[1] for mask in read.positions.values())
        max_rows = config.max_rows or rows_that_fit(model, layers, width, width, read.targets[0].numel())
        options = {"return_dict": True, **({"use_cache": False} if "use_cache" in forward_parameters(model) else {})}

        def log_p(rows: torch.Tensor) -> torch.Tensor:
            """log P(y* given x), Eq. 9, with the examples `rows` as the batch."""
            rows = rows.to(read.targets.device)
            return log_probability(model(**read.rows(rows), **options).logits, read.targets[rows])

        scores = {}
        for layer in tqdm(layers, desc="attribution", unit="layer", leave=False, disable=not progress):
            scores[layer.name] = layer_scores(log_p, layer, read.positions[layer.stack], config, max_rows)
        with torch.no_grad():
            unscaled = log_p(torch.arange(len(read)))
        return assemble(scores, float64(unscaled))  # Eq. 12


def layer_scores(
    log_p: Callable[[torch.Tensor], torch.Tensor],
    layer: NeuronLayer,
    positions: torch.Tensor,
    config: AttributionConfig,
    max_rows: int,
) -> LayerScores:
    """Eq. 11 for one layer.

    Args:
        log_p: runs the model on rows of examples, `(R,)` -> log P(y* given x) `(R,)`.
        positions: bool `(B, L)`, where the neurons are scaled.
        max_rows: rows that may run at once.
    """

    def gradients(examples: torch.Tensor, nodes: torch.Tensor) -> list[Samples]:
        """n * d log P / dn where the neurons are node * n (Eq. 10), for examples `(E,)` at nodes `(E, K)`."""
        samples = []
        rows = examples.repeat_interleave(nodes.shape[1])
        for row, node in zip(rows.split(max_rows), nodes.flatten().split(max_rows), strict=True):
            with scaled_neurons(layer, node, positions[row.to(positions.device)]) as (neurons, scaled):
                found = log_p(row)
            check_runs(layer, len(scaled))
            (gradient,) = torch.autograd.grad(found.sum(), scaled)
            samples.append(Samples(row, node, found, (neurons[0] * gradient).sum(1)))
        return samples

    nodes, weights = nodes_and_weights(config)
    samples = Samples.cat(gradients(torch.arange(len(positions)), nodes.expand(len(positions), -1)))
    return integrate(gradients, samples, weights, config)


def integrate(gradients: Gradients, samples: Samples, weights: torch.Tensor, config: AttributionConfig) -> LayerScores:
    """Eq. 11 from the gradients at the rule's nodes; "adaptive" takes more where they are needed.

    Args:
        gradients: how to take more.
        samples: of every example at the nodes of the rule.
        weights: of the rule's nodes in ascending order, `(K,)`.
    """
    if config.quadrature == "adaptive":
        return weighted_sum(*refine(gradients, samples, tolerance=1 / config.steps, most=4 * config.steps))
    place = samples.key().argsort().argsort()  # of each sample among all, example by example
    return weighted_sum(samples, weights[place % len(weights)])


def weighted_sum(samples: Samples, weights: torch.Tensor) -> LayerScores:
    """Eq. 11, sum_k weight_k * n * dP_k/dn, where dP = P d log P.

    P may be far below the range of a float, so each P_k is taken relative to the example's largest: the scores are
    `values * exp(log_scale)`.
    """
    log_scale = samples.largest_log_p()
    p = torch.exp(samples.log_p - log_scale[samples.examples])
    terms = float64(samples.gradients)
    terms = terms * (weights * p).to(terms.device)[:, None]
    values = terms.new_zeros(len(log_scale), terms.shape[1]).index_add_(0, samples.examples.to(terms.device), terms)
    return LayerScores(values, log_scale.to(values.device), nodes=len(samples.key().unique()) / len(log_scale))


@contextmanager
def scaled_neurons(
    layer: NeuronLayer, nodes: torch.Tensor, positions: torch.Tensor
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Scale the neurons of `layer` in the forward pass run inside, by `nodes` `(R,)`, at `positions` `(R, L)`.

    Yields two lists, which have an entry for each time that the layer has run: its neurons n, at least float32
    `(R, L, size)`, zero outside of `positions`; and node * n, to differentiate by.
    """
    neurons: list[torch.Tensor] = []
    scaled: list[torch.Tensor] = []

    def scale(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        own = layer.by_position(args[0].detach(), *positions.shape)
        chosen = positions.to(own.device)[..., None]
        # padding may be NaN
        neurons.append(own.to(torch.promote_types(own.dtype, torch.float32)).masked_fill(~chosen, 0.0))
        scaled.append((neurons[-1] * nodes.to(neurons[-1])[:, None, None]).requires_grad_())
        return (torch.where(chosen, scaled[-1].to(own.dtype), own).view_as(args[0]), *args[1:])

    hook = layer.module.register_forward_pre_hook(scale)
    try:
        yield neurons, scaled
    finally:
        hook.remove()


def check_runs(layer: NeuronLayer, runs: int) -> None:
    """Raise ValueError unless the layer ran once in a forward pass."""
    if runs != 1:
        raise ValueError(
            f"{layer.name} ran {runs} times in one forward pass, so it has no single set of neurons (blocks that "
            "share weights, or experts). Leave it out with the setting `neurons` of AttributionConfig."
        )
