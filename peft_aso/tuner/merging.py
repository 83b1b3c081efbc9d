"""W + sum of s B A, in place, as one product of the stacked ranks."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .forms import FOLDABLE_LAYERS, StackedHistory, merge_pair, no_autocast
from .kept import NotCopied
from .layer import all_matrices_of, tensors_of

_device, _dtype = attrgetter("device"), attrgetter("dtype")


class Buffers(NotCopied):
    """Memory for the stacked ranks of one layer after another: fresh pages cost more than what is written to them."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], torch.Tensor] = {}

    def cat(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """`torch.cat`, valid until the next call for this shape; the parts share dtype and device."""
        shape = list(parts[0].shape)
        shape[dim] = sum(map(len, parts)) if dim == 0 else sum(part.shape[dim] for part in parts)
        key = (*shape, dim, parts[0].dtype, parts[0].device)
        if key not in self._held:
            self._held[key] = parts[0].new_empty(shape)
        return torch.cat(list(parts), dim, out=self._held[key])


class PlainSum(NamedTuple):
    """The parts of a sum of adapters over one layer, where all of them are plain parameters beside its weight."""

    names: list[str]
    downs: list[torch.Tensor]  # (r_t, in) each
    ups: list[torch.Tensor]  # (out, r_t) each
    scales: list[float]
    bias: torch.Tensor | None  # (out,), the adapters' own, scaled and summed

    def stacked(self, buffers: Buffers) -> tuple[StackedHistory, float]:
        """One pair of matrices, and a factor for their product. Written into the buffers where dtypes allow."""
        mixed = len(set(map(_dtype, (*self.downs, *self.ups)))) > 1
        cat = torch.cat if mixed else buffers.cat
        down, up = cat(self.downs, 0), cat(self.ups, 1)
        if len(set(self.scales)) == 1:
            return StackedHistory(down, up, self.bias), self.scales[0]
        up = up.to(torch.promote_types(up.dtype, torch.float32))
        for columns, scale in zip(up.split([part.shape[1] for part in self.ups], 1), self.scales, strict=True):
            columns.mul_(scale)
        return StackedHistory(down, up, self.bias), 1.0


def plain_sum(layer: Any, names: Sequence[str]) -> PlainSum | None:
    """The named adapters of a linear layer as a `PlainSum`; None where its weight or one of theirs is something else.

    Args:
        layer: a `peft.tuners.lora.layer.Linear`.
        names: adapters that have weights in it.
    """
    base = layer.base_layer
    weight = base._parameters.get("weight") if type(base) in FOLDABLE_LAYERS else None
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_inference() or weight.is_meta:
        return None
    biased = [name for name in names if layer.lora_bias.get(name, False)]
    if any(name in layer.lora_variant for name in names) or (biased and base.bias is None):
        return None
    downs, ups = all_matrices_of(layer, names)
    biases = [layer.lora_B[name].bias for name in biased]
    tensors = (*downs, *ups, *biases)
    if set(map(type, tensors)) != {nn.Parameter} or set(map(_device, tensors)) != {weight.device}:
        return None
    scaled = [bias.detach() * layer.scaling[name] for name, bias in zip(biased, biases, strict=True)]
    scales = [layer.scaling[name] for name in names]
    return PlainSum(list(names), downs, ups, scales, torch.stack(scaled).sum(0) if scaled else None)


@torch.no_grad()
def add_in_place(layer: Any, parts: PlainSum, sign: int, check: bool, buffers: Buffers) -> None:
    """Add (`sign` 1) or subtract (-1) the sum to the layer's base weight: one product, one rounding.

    Raises:
        ValueError: with `check`, the weight would hold NaN or Inf; it is as before then.
    """
    base, transposed = layer.base_layer, isinstance(layer.base_layer, Conv1D)
    pair, factor = parts.stacked(buffers)
    in_float32 = base.weight.dtype == pair.down.dtype == pair.up.dtype == torch.float32
    if in_float32 and not check:  # exact in place: no second weight
        left, right = (pair.down.T, pair.up.T) if transposed else (pair.up, pair.down)
        with no_autocast(base.weight.device.type):
            base.weight.addmm_(left, right, alpha=sign * factor)
        if pair.bias is not None:
            base.bias.add_(pair.bias, alpha=sign)
        return
    weight = merge_pair(base.weight, pair, transposed, sign * factor)
    bias = None if pair.bias is None else (base.bias + sign * pair.bias).to(base.bias.dtype)
    if check and not all(part is None or torch.isfinite(part).all() for part in (weight, bias)):
        raise ValueError(_broken(layer, parts.names))
    base.weight.copy_(weight)
    if bias is not None:
        base.bias.copy_(bias)


def _broken(layer: Any, names: Sequence[str]) -> str:
    broken = [name for name in names if not all(t.isfinite().all() for t in tensors_of(layer, name))]
    if broken:
        return f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken"
    return f"NaNs detected in the merged weights. The sum of {', '.join(names)} is too large for the base weight"
