"""Low-rank updates of one module, and the ways to merge several tasks' updates into one (Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class LowRank(NamedTuple):
    """One adapter's update of one module, `scale * B @ A`.

    Attributes:
        A: `(r, in)`, the weight of `lora_A`: the paper's A_t transposed (convolutions flattened).
        B: `(out, r)`, the weight of `lora_B`.
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0


Merge = Callable[[Sequence[LowRank]], LowRank]
MERGES: dict[str, Merge] = {}


def register_merge(name: str) -> Callable[[Merge], Merge]:
    """Register a way to merge tasks under a name that `ASOLoraConfig(merge=...)` takes."""

    def register(function: Merge) -> Merge:
        MERGES[name] = function
        return function

    return register


@register_merge("sum")
def sum_updates(updates: Sequence[LowRank]) -> LowRank:
    """sum_t scale_t B_t A_t (Eq. 3) as one update of rank sum_t r_t: A stacked, scale_t * B_t side by side, exactly.

    The dtype is the updates' own.
    """
    A = torch.cat([update.A for update in updates], dim=0)
    B = torch.cat([update.B * update.scale for update in updates], dim=1)
    return LowRank(A, B, 1.0)
