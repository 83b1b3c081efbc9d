"""Counting floating-point operations, and what the machine can do at its best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peft_aso.attribution import NeuronLayer

from .captum_peer import Question, captum_layer
from .timing import seconds


def our_operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call: its matrix products, two for each multiply and add.

    Attention runs as plain products while it counts: the counter has no formula for the fused one of the CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return int(counter.get_total_flops())


def captum_operations(model: Any, asked: Question, layers: Sequence[NeuronLayer], steps: int) -> float:
    """Operations of Captum's loop over `layers`.

    Counted with two steps (Captum takes no fewer) and multiplied, for every step runs the same rows; the pass that
    reads the neurons' values first counts once a layer.
    """
    with torch.no_grad():
        reading = our_operations(lambda: model(**asked.inputs))
    total = 0.0
    for layer in layers:
        two_steps = our_operations(lambda each=layer: captum_layer(model, asked, each, 2, None))  # type: ignore[misc]
        total += reading + steps * (two_steps - reading) / 2
    return total


def machine_peak(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second in the best of ten square matrix products."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2.0 * side**3 / min(seconds(lambda: a @ b) for _ in range(10))
