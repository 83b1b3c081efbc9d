"""One forward pass over rows that repeat the examples of a batch, in the plain form and in the fast one.

A pass is called with the example of each row and answers with log P(y* given x) of each row (Eq. 9). How it
gets there is its own affair: `PlainPass` runs the whole batch as it was given, `WindowPass` (window.py) only
the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .answer import IGNORE, Answer, forward_parameters, log_probability
from .replay import take


class Pass(ABC):
    """A way to run the model on rows of examples.

    Attributes:
        positions: for each stack, bool `(B, W)`: where its neurons are scaled in this pass.
        batch_size: B.
        can_sweep: several layers may share one forward pass (sweep.py).
    """

    can_sweep = False

    model: nn.Module
    positions: dict[str, torch.Tensor]
    batch_size: int

    @abstractmethod
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """log P(y* given x) of each row, `(R,)`, for `rows` `(R,)` of examples; differentiable."""

    @abstractmethod
    def floats_per_row(self) -> int:
        """About how many numbers one row costs besides the activations of the blocks."""


class PlainPass(Pass):
    """The whole model on the batch as it was given, whatever the model is.

    Args:
        whole: run what comes after the blocks (the head) at every position too, not only where logits are
            needed: for neurons that are there.
        lean: compute logits at labelled columns only, also where the model has no option for it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        answer: Answer,
        whole: bool = False,
        lean: bool = False,
    ) -> None:
        self.model, self.inputs, self.positions = model, inputs, answer.positions
        self.batch_size = len(answer.targets)
        self.targets, self.options = answer.targets, forward_options()
        if answer.kind != "sequence" and not whole:
            self.targets, self.options = keep_labelled(model, answer.targets, self.options)
        if "use_cache" in forward_parameters(model):
            self.options["use_cache"] = False
        self.columns: torch.Tensor | None = None
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if lean and head is not None and answer.kind == "token" and "logits_to_keep" not in self.options:
            self.columns = (self.targets != IGNORE).any(0).nonzero()[:, 0]
            self.targets = self.targets[:, self.columns]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = take(self.inputs, rows, self.batch_size)
        with self._head_at_columns():
            logits = self.model(**inputs, **self.options).logits
        return log_probability(logits, self.targets[rows])

    @contextmanager
    def _head_at_columns(self) -> Iterator[None]:
        """The head works on each position by itself: let it see those of `columns` only."""
        if self.columns is None:
            yield
            return
        columns, head = self.columns, self.model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, columns], *args[1:]))
        try:
            yield
        finally:
            hook.remove()

    def floats_per_row(self) -> int:
        return 3 * self.targets[0].numel() * vocabulary(self.model)


def forward_options() -> dict[str, Any]:
    """Options of every forward call; given as arguments, so that the model's configuration stays as it is."""
    return {"return_dict": True}


def keep_labelled(
    model: nn.Module, targets: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Ask for logits only at columns where some example has an answer token, where the model can do that."""
    if "logits_to_keep" not in forward_parameters(model):
        return targets, options
    columns = (targets != IGNORE).any(0).nonzero()[:, 0]
    if len(columns) == targets.shape[1]:
        return targets, options
    return targets[:, columns], {**options, "logits_to_keep": columns}


def vocabulary(model: nn.Module) -> int:
    """Width of the logits, about."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
