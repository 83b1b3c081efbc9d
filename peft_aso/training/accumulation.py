"""Whether a loss is normalised by the count of labels it is given: what gradient accumulation has to know."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def counts_items(loss_of: Callable[[Any, Any], torch.Tensor], inputs: Mapping[str, Any], count: Any) -> torch.Tensor:
    """Whether a loss changes with `num_items_in_batch`; bool, on the loss's device.

    Takes two passes without gradients, in the model's own mode: a loss may count in training only. Both draw the same
    random numbers, and what comes next draws them again.

    Args:
        loss_of: the loss of inputs and a count. It gets a shallow copy of the inputs, of which it may pop labels.
        inputs: a batch.
        count: `num_items_in_batch`, as the Trainer gives it.
    """
    losses: list[torch.Tensor] = []
    for factor in (1, 1000):
        with _rehearsal():
            losses.append(loss_of(copy.copy(inputs), count * factor).detach().float().mean())
    return ~torch.isclose(losses[0], losses[1], rtol=1e-3)


@contextmanager
def _rehearsal() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        yield
    torch.clear_autocast_cache()  # weights cast without a gradient must not be found again by the training step
