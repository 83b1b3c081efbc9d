"""Eq. 10-11: gradients at the nodes of the path, several examples and layers at once, and their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .memory import RowBudget
from .neurons import NeuronLayer
from .passes import Pass
from .replay import Recording, recorded, scaled, skipped
from .sweep import swept
from .vector import float64

# how many numbers of one recording are held at once, 512 MiB in float32
_RECORDING_BUDGET = 2**27


@dataclass
class LayerScores:
    """One layer's scores: `values * exp(log_size)` is Eq. 11; both float64, `(B, size)` and `(B,)`.

    `nodes` is how many nodes were run for an example, in the mean.
    """

    values: torch.Tensor
    log_size: torch.Tensor
    nodes: float


@dataclass
class Gradients:
    """What one layer's neurons do to log P, for E examples at K nodes of the path each.

    Attributes:
        examples: indices `(E,)` into the batch.
        nodes: in [0, 1], float64 `(E, K)`.
        log_p: log P with the layer's neurons scaled by the node, float64 `(E, K)`.
        values: neuron * dlogP/dneuron there, summed over positions, `(E, K, size)`. The sum over neurons is the
            derivative of log P by the node.
    """

    examples: torch.Tensor
    nodes: torch.Tensor
    log_p: torch.Tensor
    values: torch.Tensor


def every_example(run: Pass) -> torch.Tensor:
    """The indices of the examples of a pass, `(B,)`."""
    return torch.arange(run.batch_size, device=next(iter(run.positions.values())).device)


def record(run: Pass, layers: list[NeuronLayer], outputs: bool, live: bool = False) -> Recording:
    """One unscaled pass over every example of the batch, with the neurons of `layers` and log P_m.

    Args:
        live: keep the neurons in the graph, for `unscaled_gradients`.
    """
    rows = every_example(run)
    with torch.set_grad_enabled(live), recorded(layers, run.positions, outputs, live) as recording:
        recording.log_probability = run(rows)
    return recording


def unscaled_gradients(run: Pass, layers: list[NeuronLayer], recording: Recording) -> dict[str, Gradients]:
    """Gradients of all layers at the node 1, where none is scaled: one backward pass of the recording serves all."""
    assert recording.log_probability is not None
    log_p = float64(recording.log_probability.detach())[:, None]
    live = [recording.live.pop(layer.name) for layer in layers]
    gradients = torch.autograd.grad(recording.log_probability.sum(), live)
    examples, found = every_example(run), {}
    for layer, gradient in zip(layers, gradients, strict=True):
        own, where = recording.neurons[layer.name], run.positions[layer.stack]
        chosen = gradient.view(own.shape) * where.to(own.device)[..., None]
        values = (chosen.to(torch.promote_types(own.dtype, torch.float32)) * own).sum(1).to(log_p.device)
        found[layer.name] = Gradients(examples, torch.ones_like(log_p), log_p, values[:, None])
    return found


def joined(first: Gradients, second: Gradients) -> Gradients:
    """Gradients of the same examples, the nodes of both."""
    parts = ((getattr(first, name), getattr(second, name)) for name in ("nodes", "log_p", "values"))
    return Gradients(first.examples, *(torch.cat([a, b.to(a)], 1) for a, b in parts))


def layer_gradients(
    run: Pass,
    layer: NeuronLayer,
    recording: Recording,
    examples: torch.Tensor,
    nodes: torch.Tensor,
    max_rows: int,
    skip: bool,
) -> Gradients:
    """Gradients of one layer, in as many passes as `max_rows` asks for.

    Args:
        examples, nodes: of `Gradients`.
        skip: hand on the recorded output of the block below instead of running the blocks below.
    """
    count = nodes.shape[1]
    rows, factors = examples.repeat_interleave(count), nodes.flatten()
    logs, values = [], []
    # whole examples, or a part of the nodes of one: rows that share a prompt stay side by side
    size = max_rows // count * count if max_rows >= count else 0
    sizes = size or [len(part) for each in nodes for part in each.split(max_rows)]
    for part_rows, part_factors in zip(rows.split(sizes), factors.split(sizes), strict=True):
        log_p, gradient = _rows(run, layer, recording, part_rows, part_factors, skip)
        logs.append(log_p)
        values.append(gradient)
    shape = (len(examples), count)
    return Gradients(examples, nodes, torch.cat(logs).view(shape), torch.cat(values).view(*shape, -1))


def sweep_gradients(
    run: Pass, layers: list[NeuronLayer], recording: Recording, nodes: torch.Tensor
) -> list[Gradients]:
    """Gradients of several layers of one stack at the nodes `(K,)`, of every example, in one sweep (sweep.py)."""
    examples = every_example(run)
    rows = examples.repeat_interleave(len(nodes))
    factors, positions = nodes.repeat(run.batch_size), run.positions[layers[0].stack][rows]
    with swept(layers, recording, run.batch_size, rows, factors, positions) as leaves:
        log_p = run(rows.repeat(len(layers)))
        gradients = torch.autograd.grad(log_p.sum(), leaves)
    wide = float64(log_p.detach()).view(len(layers), run.batch_size, -1)
    at = nodes.expand(run.batch_size, -1)
    found = []
    for layer, logs, gradient in zip(layers, wide, gradients, strict=True):
        values = (gradient * recording.neurons_of(layer, rows)).sum(1).to(wide.device)
        found.append(Gradients(examples, at, logs, values.view(*logs.shape, -1)))
    return found


def summed(found: Gradients, weights: torch.Tensor) -> LayerScores:
    """Eq. 11 as a weighted sum over the nodes, `weights` `(K,)` or `(E, K)`, examples in the order that they have.

    P is exp(log P), so dP/dn at a node is P * dlogP/dn. P may be far below float32's range: the sum is taken relative
    to the largest P of the example, which `log_size` remembers.
    """
    log_size = found.log_p.amax(1)
    share = torch.exp(found.log_p - log_size[:, None]) * weights.to(found.log_p)
    values = torch.einsum("bk,bkn->bn", share, found.values.to(share.dtype))
    return LayerScores(values, log_size, nodes=share.shape[1])


def _rows(
    run: Pass, layer: NeuronLayer, recording: Recording, rows: torch.Tensor, factors: torch.Tensor, skip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """log P_k `(R,)` in float64, and neuron * dlogP_k/dneuron summed over positions, `(R, size)`."""
    own = recording.neurons_of(layer, rows)
    positions = run.positions[layer.stack][rows]
    below = skipped(layer, recording, run.batch_size, rows) if skip else None
    with scaled(layer, own, factors, positions) as leaf:
        if below is None:
            log_p = run(rows)
        else:
            with below:
                log_p = run(rows)
        (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
    wide = float64(log_p.detach())
    return wide, (gradient * own).sum(1).to(wide.device)


def groups(run: Pass, layers: list[NeuronLayer]) -> list[list[NeuronLayer]]:
    """Layers in groups of one stack whose recording fits in memory, in order."""
    found: list[list[NeuronLayer]] = []
    held = 0
    for layer in layers:
        size = 2 * layer.size * run.positions[layer.stack].numel()
        if not found or held + size > _RECORDING_BUDGET:
            found.append([])
            held = 0
        found[-1].append(layer)
        held += size
    return found


def sweeps(layers: list[NeuronLayer], rows: int, budget: RowBudget) -> list[list[NeuronLayer]]:
    """Layers of one stack, in parts that can be swept at once; `rows` is of one layer."""
    found: list[list[NeuronLayer]] = []
    held = 0.0
    for layer in layers:
        cost = budget.cost(rows, (len(layer.blocks) - layer.block_index) / len(layer.blocks))
        if not found or held + cost > budget.rows:
            found.append([])
            held = 0.0
        found[-1].append(layer)
        held += cost
    return found
