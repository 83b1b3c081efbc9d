"""The frozen history of one layer as few matrices, in the cheapest form for its size; built once.

Stacked: one pair of matrices, all adapters in a row. Dense: their product, which is smaller once the summed rank is
above in * out / (in + out). Folded: the base weight plus the product, with which a layer runs in its base weight's
place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .kept import Kept, NotCopied, Watch, tensor_state
from .layer import adapters_in, all_matrices_of, fingerprint

FOLDABLE_LAYERS = (nn.Linear, Conv1D)
_EXACT = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


class StackedHistory(NamedTuple):
    """Several adapters of one layer as one: `x @ down.T @ up.T + bias` is the sum of what each adds."""

    down: torch.Tensor  # (R, in), R = sum of the ranks
    up: torch.Tensor  # (out, R), each adapter's alpha/r multiplied in
    bias: torch.Tensor | None  # (out,), where an adapter has lora_bias


class DenseHistory(NamedTuple):
    """The same as one matrix: `x @ delta.T + bias`."""

    delta: torch.Tensor  # (out, in)
    bias: torch.Tensor | None  # (out,)


class FoldedHistory(NamedTuple):
    """The same inside of the base layer's weight: `x @ weight.T + base bias + bias` has the base layer in it."""

    weight: torch.Tensor  # as the base layer stores it: (out, in), or (in, out) of a Conv1D
    bias: torch.Tensor | None  # (out,), what the adapters add to the base layer's bias


Form = StackedHistory | DenseHistory | FoldedHistory


def stack(layer: LoraLayer, names: Sequence[str]) -> StackedHistory:
    """Stack the named adapters of a linear or embedding layer; their matrices are not changed."""
    downs, ups = all_matrices_of(layer, names)
    scales = [layer.scaling[name] for name in names]
    with torch.no_grad():
        down = torch.cat(downs, dim=0)
        up = torch.cat(ups, dim=1)
        if len(set(scales)) == 1:
            up.mul_(scales[0])
        else:
            for columns, scale in zip(up.split([matrix.shape[1] for matrix in ups], dim=1), scales, strict=True):
                columns.mul_(scale)
    biases = [
        layer.lora_B[name].bias.detach() * scale
        for scale, name in zip(scales, names, strict=True)
        if layer.lora_bias.get(name, False)
    ]
    return StackedHistory(down, up, torch.stack(biases).sum(0) if biases else None)


def merge_pair(weight: torch.Tensor, pair: StackedHistory, transposed: bool, factor: float = 1.0) -> torch.Tensor:
    """A new `weight + factor * up @ down`, summed in float32 (float64) and rounded once to the weight's dtype.

    Args:
        weight: `(out, in)`, or `(in, out)` with `transposed`.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, pair.down.dtype), torch.float32)
    up, down = pair.up.to(dtype), pair.down.to(dtype)
    left, right = (down.T, up.T) if transposed else (up, down)
    with no_autocast(weight.device.type):
        return torch.addmm(weight.detach().to(dtype), left, right, alpha=factor).to(weight.dtype)


def fold_obstacle(layer: LoraLayer) -> str | None:
    """Why the layer cannot run with another weight in place of its base layer's; None if it can."""
    base = layer.base_layer
    if type(base) not in FOLDABLE_LAYERS:
        return f"its base layer is a {type(base).__name__}"
    weight = base._parameters.get("weight")
    # quantized, sharded and fake tensors are classes of their own
    if type(weight) is not nn.Parameter or weight.dtype not in (*_EXACT, *_HALF):
        return "its weight is not a plain tensor of floating point numbers"
    if weight.requires_grad:
        return "its base weight trains"
    if weight.is_meta or weight.dim() != 2:
        return "its weight is not here (offloaded, sharded or on the meta device)"
    replaced = "forward" in base.__dict__ or base._compiled_call_impl is not None
    if replaced or "_hf_hook" in layer.__dict__:
        return "its forward has been replaced (by accelerate's hooks, or compiled on its own)"
    return None


def rounds(layer: LoraLayer, half: torch.dtype | None) -> bool:
    """Whether a folded weight would be rounded to half precision: in itself, or by autocast to `half`."""
    return layer.base_layer.weight.dtype not in _EXACT or half is not None


def half_autocast(device_type: str) -> torch.dtype | None:
    """The half precision that autocast computes products in at the moment; None if it does not."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return dtype if dtype in _HALF else None


def compute_dtype(x: torch.Tensor, half: torch.dtype | None) -> torch.dtype | None:
    """The dtype for a history beside the base layer; None: the adapters' own.

    In half precision the product has an error of 2^-9 of the history's own output, which is rounded to half precision
    anyway, so nothing is gained by the slower float32.
    """
    return half if half is not None else x.dtype if x.dtype in _HALF else None


def build(layer: LoraLayer, names: Sequence[str], wanted: str, dtype: torch.dtype | None) -> Form:
    """The named adapters of a linear or embedding layer in one form.

    Args:
        wanted: `"folded"`, `"dense"`, `"stacked"`, or `"auto"` for the smaller one of the last two.
        dtype: of the result (the folded weight has the base weight's); None: the adapters' own.
    """
    pair = stack(layer, names)
    if wanted == "folded":
        base = layer.base_layer
        return FoldedHistory(merge_pair(base.weight, pair, isinstance(base, Conv1D)), pair.bias)
    (rank, columns), rows = pair.down.shape, pair.up.shape[0]
    if wanted == "dense" or (wanted != "stacked" and rank * (rows + columns) > rows * columns):
        return _dense(layer, pair, dtype)
    bias = None if pair.bias is None else pair.bias.to(dtype or pair.bias.dtype)
    return StackedHistory(pair.down.to(dtype or pair.down.dtype), pair.up.to(dtype or pair.up.dtype), bias)


def _dense(layer: LoraLayer, pair: StackedHistory, dtype: torch.dtype | None) -> DenseHistory:
    exact = torch.promote_types(pair.down.dtype, torch.float32)
    dtype = dtype or torch.promote_types(pair.down.dtype, pair.up.dtype)
    down, up = pair.down.to(exact), pair.up.to(exact)
    with no_autocast(down.device.type):
        # an embedding reads columns: they lie in one piece when the transpose is what is made
        delta = (down.T @ up.T).T if layer.lora_embedding_A else up @ down
    return DenseHistory(delta.to(dtype), pair.bias if pair.bias is None else pair.bias.to(dtype))


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Matrices that are kept are made in full precision, also when the first to ask runs under autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _Held(NamedTuple):
    asked: tuple[Any, ...]
    watch: Watch
    form: Form | None


class FormCache(NotCopied):
    """One form of one layer's adapters, kept until something about them changes. Copies and pickles are empty."""

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._kept: Kept[Form] = Kept()

    def get(
        self,
        layer: LoraLayer,
        names: tuple[str, ...],
        asked: tuple[Any, ...],
        make: Callable[[list[str]], Form],
        with_base: bool,
        glance: int | None = None,
    ) -> Form | None:
        """The form that is held, or a new one from `make` if anything has changed; None if no adapter is here.

        Args:
            names: adapters of the model; `make` gets those that have weights in this layer.
            asked: what else the form depends on.
            with_base: whether it depends on the base layer's weight.
            glance: as in `Watch.unchanged`.
        """
        held = self._held  # read once: another thread may put another one there
        if held is not None and held.asked == (names, asked) and held.watch.unchanged(glance):
            return held.form
        self._held = None
        present = adapters_in(layer, names)
        watch = _watch(layer, present, with_base)
        form = None
        if present:
            base = (tensor_state(layer.base_layer.weight),) if with_base else ()
            form = self._kept.get((asked, fingerprint(layer, present), *base), lambda: make(present))
        else:
            self._kept.clear()
        if watch is not None:
            self._held = _Held((names, asked), watch, form)
        return form

    def clear(self) -> None:
        """Forget what is held and free its memory."""
        self._held = None
        self._kept.clear()


def _watch(layer: LoraLayer, names: Sequence[str], with_base: bool) -> Watch | None:
    """A watch over the adapters' weights and scales; None where the weights are no plain parameters."""
    slots: list[tuple[Any, str]] = []
    for name in names:
        if name in layer.lora_embedding_A:
            slots += [(layer.lora_embedding_A._parameters, name), (layer.lora_embedding_B._parameters, name)]
            continue
        slots += [(layer.lora_A[name]._parameters, "weight"), (layer.lora_B[name]._parameters, "weight")]
        if layer.lora_bias.get(name, False):
            slots.append((layer.lora_B[name]._parameters, "bias"))
    if with_base:
        slots.append((layer.base_layer._parameters, "weight"))
    if not all(isinstance(place.get(name), torch.Tensor) for place, name in slots):
        return None
    modules = [layer.lora_A, layer.lora_B]  # an adapter's matrices may be exchanged as modules
    embeddings = [layer.lora_embedding_A, layer.lora_embedding_B]
    tables = [(module.__dict__, "_modules") for module in modules]
    tables += [(module.__dict__, "_keys") for module in embeddings]
    return Watch(slots, [(layer.__dict__, "scaling"), *tables])
