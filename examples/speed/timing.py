"""Taking times: each side in turn, the device waited for, one run of each beforehand that does not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def wait() -> None:
    """Let the accelerator finish what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def repeated(function: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        function()
    return [seconds(function) for _ in range(repeats)]


def in_turn(*functions: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[list[float]]:
    """Seconds of each function, A B A B, so that a machine whose speed drifts is fair to all."""
    for _ in range(warm_up):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, into in zip(functions, times, strict=True):
            into.append(seconds(function))
    return times


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a part of the largest value of `theirs`."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()
