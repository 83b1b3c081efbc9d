"""Looking at a model without leaving a trace: eval mode and the random state are put back whatever
happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own training flag and the random state are as they were.

    Works under the caller's `no_grad` and `inference_mode`: gradients are on again inside.
    """
    training = {module: module.training for module in model.modules()}
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        # weights cast by autocast without a gradient must not be found again by the caller's training step
        torch.clear_autocast_cache()
