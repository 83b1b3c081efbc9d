"""The soft coefficients psi (Eq. 6) of each task, kept as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class CoefficientStore:
    """psi of each current task for each task of its history.

    psi is kept as one float32 tensor a task, `(T,)` or `(T, L)` with one value a layer, so that a compiled step
    that reads it is not compiled again when it changes.
    """

    def __init__(self) -> None:
        self._psi: dict[str, torch.Tensor] = {}
        self._layer_of: dict[str, dict[str, int] | None] = {}

    def set(
        self, task: str, history: Sequence[str], psi: Mapping[str, Any], layer_of: Mapping[str, int] | None = None
    ) -> None:
        """Set psi of `task`; `psi` has one entry for each adapter of `history`, a number or one number a layer."""
        if set(psi) != set(history):
            raise ValueError(
                f"psi is given for {sorted(psi)}, but the history of {task!r} is {list(history)}. Give one value for "
                "each task of the history."
            )
        if not history:
            return
        values = torch.stack([torch.as_tensor(psi[name], dtype=torch.float32).cpu() for name in history])
        if values.dim() not in (1, 2) or not torch.isfinite(values).all():
            raise ValueError(f"psi must be finite, one number a task or one a task and layer; got {dict(psi)}.")
        if values.dim() == 2 and layer_of is None:
            raise ValueError("psi has one value a layer: say with `layer_of` which layer each LoRA module belongs to.")
        held = self._psi.get(task)
        if held is not None and held.shape == values.shape:
            held.copy_(values)  # in place: whoever holds the tensor sees the new values
        else:
            self._psi[task] = values
        self._layer_of[task] = dict(layer_of) if layer_of is not None else None

    def tensor(
        self, task: str, history: Sequence[str], device: torch.device
    ) -> tuple[torch.Tensor, dict[str, int] | None]:
        """psi `(T,)` or `(T, L)` on `device` and, for the latter, the layer of each module. Ones before any update."""
        held = self._psi.get(task)
        if held is None or held.shape[0] != len(history):
            return torch.ones(len(history), device=device), None
        if held.device != device:
            held = self._psi[task] = held.to(device)
        return held, self._layer_of[task]

    def as_dict(self, task: str, history: Sequence[str]) -> dict[str, Any]:
        """Adapter -> psi, as plain numbers or lists."""
        values, _ = self.tensor(task, history, self._psi[task].device if task in self._psi else torch.device("cpu"))
        return dict(zip(history, values.tolist(), strict=True))

    def forget(self, task: str) -> None:
        """Drop what is kept of a deleted task."""
        self._psi.pop(task, None)
        self._layer_of.pop(task, None)
