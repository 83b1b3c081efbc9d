"""Eq. 10-11 for one layer: all steps of the path, several examples at once, as the rows of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .neurons import NeuronLayer
from .passes import Pass
from .replay import Recording, recorded, scaled, skipped

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
    for part_rows, part_factors in zip(rows.split(max_rows), factors.split(max_rows), strict=True):
        log_p, gradient = _rows(run, layer, recording, part_rows, part_factors, skip)
        logs.append(log_p)
        gradients.append(gradient)
    log_p = torch.cat(logs).view(run.batch_size, count)
    gradient = torch.cat(gradients).view(run.batch_size, count, layer.size)
    log_size = log_p.amax(1)
    share = torch.exp(log_p - log_size[:, None]) * weights.to(log_p)
    return LayerScores(torch.einsum("bk,bkn->bn", share, gradient.to(share.dtype)), log_size)


def _rows(
    run: Pass, layer: NeuronLayer, recording: Recording, rows: torch.Tensor, factors: torch.Tensor, skip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """log P_k `(R,)` in float64, and neuron * dlogP_k/dneuron summed over positions, `(R, size)`."""
    neurons = recording.neurons[layer.name]
    own = neurons.expand(len(rows), -1, -1) if len(neurons) == 1 else neurons[rows.to(neurons.device)]
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


def _device(run: Pass) -> torch.device:
    return next(iter(run.positions.values())).device


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.device.type != "mps" else tensor.cpu().double()
