"""The soft coefficients psi (Eq. 6) of each task, kept as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


class CoefficientStore:
    """psi of each current task for each task of its history.

    psi is kept as one float32 tensor a task, `(T,)` or `(T, L)` with one value a layer, so that a compiled
    step that reads it is not compiled again when it changes.
    """

    def __init__(self) -> None:
        self._psi: dict[str, torch.Tensor] = {}
        self._layer_of: dict[str, dict[str, int] | None] = {}

    def set(
        self,
        task: str,
        history: Sequence[str],
        psi: Mapping[str, Any],
        layer_of: Mapping[str, int] | None = None,
    ) -> None:
        """Set psi of `task`: one entry for each adapter of `history`, a number or one number a layer.

        Raises:
            ValueError: a task of the history is missing in `psi` or an unknown one is in it; a value is not
                finite; one number a layer without `layer_of`, or with one that names a layer that psi does
                not have.
        """
        if set(psi) != set(history):
            raise ValueError(
                f"psi is given for {sorted(psi)}, but the history of {task!r} is {list(history)}. Give one "
                "value for each task of the history."
            )
        if not history:
            return
        with torch.inference_mode(False), torch.no_grad():
            values = _table([psi[name] for name in history])
            held = self._psi.get(task)
            if values.dim() == 2:
                _check_layers(layer_of, values.shape[1])
            if held is not None and held.shape == values.shape:
                held.copy_(values)  # in place: whoever holds the tensor sees the new values
            else:
                self._psi[task] = values
        self._layer_of[task] = dict(layer_of) if layer_of is not None and values.dim() == 2 else None

    def knows(self, task: str) -> bool:
        """True if psi of `task` was set."""
        return task in self._psi

    def tensor(
        self, task: str, history: Sequence[str], device: torch.device
    ) -> tuple[torch.Tensor, dict[str, int] | None]:
        """psi `(T,)` or `(T, L)` on `device` and, for the latter, the layer of each module.

        Ones before any update, and when the history is not the one that psi was set for.
        """
        held = self._psi.get(task)
        if held is None or held.shape[0] != len(history):
            return torch.ones(len(history), device=device), None
        if held.device != device:
            with torch.inference_mode(False):
                held = self._psi[task] = held.to(device)
        return held, self._layer_of[task]

    def as_dict(self, task: str, history: Sequence[str]) -> dict[str, Any]:
        """Adapter -> psi, as plain numbers or lists."""
        device = self._psi[task].device if task in self._psi else torch.device("cpu")
        values, _ = self.tensor(task, history, device)
        return dict(zip(history, values.tolist(), strict=True))

    def forget(self, task: str) -> None:
        """Drop what is kept of a deleted task."""
        self._psi.pop(task, None)
        self._layer_of.pop(task, None)


def _table(rows: list[Any]) -> torch.Tensor:
    """One float32 tensor of all rows, `(T,)` or `(T, L)`, sharing no memory with them."""
    tensors = [torch.as_tensor(row, dtype=torch.float32).detach().cpu() for row in rows]
    same = len({tensor.shape for tensor in tensors}) == 1 and tensors[0].dim() <= 1
    if not same or not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(
            "psi must be finite, and one number a task or the same count of numbers (one a layer) for each "
            f"task; got {[tensor.tolist() for tensor in tensors]}."
        )
    return torch.stack(tensors)


def _check_layers(layer_of: Mapping[str, int] | None, count: int) -> None:
    if layer_of is None:
        raise ValueError("psi has one value a layer: say with `layer_of` which layer each LoRA module belongs to.")
    outside = {module: layer for module, layer in layer_of.items() if not 0 <= layer < count}
    if outside:
        raise ValueError(f"psi has {count} layers, but layer_of names others: {outside}.")


def layers_of_blocks(modules: Iterable[str], neurons: Sequence[str]) -> dict[str, int]:
    """LoRA module -> the FFN layer of the same block.

    Modules outside of all blocks (embeddings, a head) go with the nearest end: the first or the last layer.

    Args:
        modules: names of LoRA modules.
        neurons: names of the FFN layers' down projections, in the order in which psi has its values.
    """
    blocks = [_block_of(name) for name in neurons]
    result = {}
    for name in modules:
        inside = [index for index, block in enumerate(blocks) if f"{name}.".startswith(block)]
        head = "head" in name or "score" in name or "classifier" in name
        result[name] = inside[0] if inside else len(blocks) - 1 if head else 0
    return result


def _block_of(name: str) -> str:
    """`"model.layers.3.mlp.down_proj"` -> `"model.layers.3."`: the name up to its first number."""
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) + "." if numbered else f"{name}."
