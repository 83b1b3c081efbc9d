"""How many rows go through the model at once: what fits into the memory that is free, and no more than pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from .neurons import NeuronLayer
from .passes import Pass

# of the memory that is free; the rest is for the caller and for what is not counted here
_SHARE = {"cpu": 0.25, "cuda": 0.5}
# more rows are no faster: on a CPU the tensors fall out of its caches (docs/performance.md)
_MOST = {"cpu": 512, "cuda": 4096}
_UNKNOWN = 2 * 2**30  # bytes, where the free memory cannot be asked for


@dataclass(frozen=True)
class RowBudget:
    """How many rows at once.

    Attributes:
        rows: that may run through all blocks and the head at once.
        head: which part of such a row's memory is the head's and the attention's; the rest grows with the blocks run.
        capped: `rows` is the caller's, and counts rows whatever they cost.
    """

    rows: int
    head: float = 0.0
    capped: bool = False

    @staticmethod
    def of(run: Pass, layers: list[NeuronLayer], max_rows: int | None) -> RowBudget:
        """The caller's `max_rows`, or what the free memory of the pass's device allows."""
        if max_rows is not None:
            return RowBudget(max_rows, capped=True)
        device = next(iter(run.positions.values())).device
        blocks, besides = _block_bytes(run, layers), 4 * run.floats_per_row()
        fitting = int(_SHARE.get(device.type, 0.25) * free_memory(device)) // (blocks + besides)
        return RowBudget(max(1, min(_MOST.get(device.type, 512), fitting)), besides / (blocks + besides))

    def cost(self, rows: int, blocks_run: float) -> float:
        """How many of `self.rows` so many rows count for that run a part of the blocks (1.0: all)."""
        return rows * (1.0 if self.capped else self.head + (1 - self.head) * blocks_run)


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return _UNKNOWN


def _block_bytes(run: Pass, layers: list[NeuronLayer]) -> int:
    """About how much the activations of one row take over all blocks, kept for the backward pass."""
    width = max(mask.shape[1] for mask in run.positions.values())
    config: Any = run.model.config
    hidden = int(getattr(config.get_text_config(), "hidden_size", None) or layers[0].size // 4)
    blocks = max(len(layer.blocks) for layer in layers) or 1
    return 4 * width * blocks * (10 * hidden + 4 * max(layer.size for layer in layers))
