"""Eq. 10-11 for one layer: all steps of the path, several examples at once, as the rows of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .memory import RowBudget
from .neurons import NeuronLayer
from .passes import Pass
from .replay import Recording, recorded, scaled, skipped
from .sweep import swept

# how many numbers of one recording are held at once, 512 MiB in float32
_RECORDING_BUDGET = 2**27


@dataclass
class LayerScores:
    """One layer's scores: `values * exp(log_size)` is Eq. 11; both float64, `(B, size)` and `(B,)`."""

    values: torch.Tensor
    log_size: torch.Tensor


def record(run: Pass, layers: list[NeuronLayer], outputs: bool) -> Recording:
    """One unscaled pass over every example of the batch, with the neurons of `layers` and log P_m."""
    rows = torch.arange(run.batch_size, device=_device(run))
    with torch.no_grad(), recorded(layers, run.positions, outputs) as recording:
        recording.log_probability = _float64(run(rows))
    return recording


def layer_scores(
    run: Pass,
    layer: NeuronLayer,
    recording: Recording,
    path: tuple[torch.Tensor, torch.Tensor],
    max_rows: int,
    skip: bool,
) -> LayerScores:
    """Eq. 11 for one layer: sum over steps of weight * neuron * dP/dneuron, summed over positions.

    P is exp(log P), so dP/dn at step k is P_k * dlogP/dn. P_k may be far below float32's range: the sum is
    taken relative to the largest P of the example, which `log_size` remembers.

    Args:
        path: nodes and weights, `(steps,)` each.
        skip: hand on the recorded output of the block below instead of running the blocks below.
    """
    nodes, weights = path
    count, device = len(nodes), _device(run)
    rows = torch.arange(run.batch_size, device=device).repeat_interleave(count)
    factors = nodes.repeat(run.batch_size)
    logs, gradients = [], []
    # whole examples, or a part of the steps of one: rows that share a prompt stay side by side
    size = max_rows // count * count if max_rows >= count else 0
    sizes = size or [len(part) for _ in range(run.batch_size) for part in nodes.split(max_rows)]
    for part_rows, part_factors in zip(rows.split(sizes), factors.split(sizes), strict=True):
        log_p, gradient = _rows(run, layer, recording, part_rows, part_factors, skip)
        logs.append(log_p)
        gradients.append(gradient)
    return _summed(torch.cat(logs), torch.cat(gradients), weights, run.batch_size)


def sweep_scores(
    run: Pass, layers: list[NeuronLayer], recording: Recording, path: tuple[torch.Tensor, torch.Tensor]
) -> list[LayerScores]:
    """`layer_scores` of several layers of one stack in one upward sweep (sweep.py), all steps at once."""
    nodes, weights = path
    rows = torch.arange(run.batch_size, device=_device(run)).repeat_interleave(len(nodes))
    factors, positions = nodes.repeat(run.batch_size), run.positions[layers[0].stack][rows]
    with swept(layers, recording, run.batch_size, rows, factors, positions) as leaves:
        log_p = run(rows.repeat(len(layers)))
        gradients = torch.autograd.grad(log_p.sum(), leaves)
    wide = _float64(log_p.detach()).view(len(layers), len(rows))
    found = []
    for layer, logs, gradient in zip(layers, wide, gradients, strict=True):
        own = recording.neurons_of(layer, rows)
        found.append(_summed(logs, (gradient * own).sum(1).to(wide.device), weights, run.batch_size))
    return found


def _summed(log_p: torch.Tensor, gradient: torch.Tensor, weights: torch.Tensor, batch_size: int) -> LayerScores:
    """The sum of Eq. 11 over the steps, from log P_k `(R,)` and the gradients of log P_k `(R, size)`."""
    log_p = log_p.view(batch_size, -1)
    gradient = gradient.view(*log_p.shape, -1)
    log_size = log_p.amax(1)
    share = torch.exp(log_p - log_size[:, None]) * weights.to(log_p)
    return LayerScores(torch.einsum("bk,bkn->bn", share, gradient.to(share.dtype)), log_size)


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
    wide = _float64(log_p.detach())
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


def _device(run: Pass) -> torch.device:
    return next(iter(run.positions.values())).device


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.device.type != "mps" else tensor.cpu().double()
