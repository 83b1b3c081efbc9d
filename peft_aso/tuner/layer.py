"""What the tuner reads from and writes to one LoRA layer of PEFT's, whatever kind it is of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

from .kept import tensor_state
from .low_rank import LowRank

_DOWN = ("lora_A", "lora_embedding_A")
UNSUPPORTED_LAYERS = (MultiheadAttention, ParamWrapper)


def modules_outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without what lies in the adapters: as quick with 100 adapters as with one."""
    seen: set[nn.Module] = set()
    to_visit: list[tuple[str, nn.Module]] = [("", model)]
    while to_visit:
        name, module = to_visit.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        parts: dict[str, Any] = module._modules
        if isinstance(module, LoraLayer):
            parts = {"base_layer": module.base_layer}
        prefix = f"{name}." if name else ""
        to_visit += [(prefix + part, child) for part, child in reversed(parts.items()) if child is not None]


def freeze_names(
    layer: LoraLayer, frozen: Collection[str], before: Collection[str], fixed: Collection[str] = ()
) -> None:
    """Declare the weights of the adapters in `frozen` as frozen, and A of those in `fixed`, through PEFT's own door.

    Args:
        layer: a layer to which the history is attached.
        frozen: adapters that never train.
        before: those for which this was called the last time; what PEFT's own variants declared about an
            adapter that is in `before` only holds again.
        fixed: adapters of which B alone trains.
    """
    names: dict[str, tuple[str, ...]] = layer.frozen_peft_weight_names
    own = layer.declared_frozen | {name: parts for name, parts in names.items() if name not in before}
    own |= {name: tuple(dict.fromkeys((*own.get(name, ()), *_DOWN))) for name in fixed}
    layer.declared_frozen = {name: parts for name, parts in own.items() if name in layer.scaling}
    layer.frozen_peft_weight_names = layer.declared_frozen | dict.fromkeys(frozen, layer.adapter_layer_names)


def adapters_in(layer: LoraLayer, names: Iterable[str]) -> list[str]:
    """Those of `names` that have weights in this layer."""
    linear, embedding = layer.lora_A._modules, layer.lora_embedding_A._keys
    return [name for name in names if name in linear or name in embedding]


def matrices_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_A` `(r, in, ...)` and `lora_B` `(out, r, ...)` of one adapter, whatever kind the layer is of."""
    parts = layer._modules  # asked for each adapter of each layer: past torch's slow attributes
    down = parts["lora_A"]._modules.get(name)
    if down is not None:
        return _weight(down), _weight(parts["lora_B"]._modules[name])
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def all_matrices_of(layer: LoraLayer, names: Sequence[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`matrices_of` each adapter: all `lora_A`, all `lora_B`. Quick where there are hundreds."""
    down, up = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    try:
        return [down[name]._parameters["weight"] for name in names], [up[name]._parameters["weight"] for name in names]
    except KeyError:  # an embedding, or a weight that torch's parametrizations make
        pairs = [matrices_of(layer, name) for name in names]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor | None = module._parameters.get("weight")
    return module.weight if weight is None else weight  # torch's parametrizations make it when it is asked for


def tensors_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, ...]:
    """All tensors of one adapter: A, B and, with `lora_bias`, B's bias."""
    if layer.lora_bias.get(name, False):
        return (*matrices_of(layer, name), layer.lora_B[name].bias)
    return matrices_of(layer, name)


def subspace_of(layer: LoraLayer, name: str) -> torch.Tensor:
    """A of one adapter as rows `(r, in)`: the subspace of the task (convolutions flattened)."""
    return matrices_of(layer, name)[0].flatten(1)


def fingerprint(layer: LoraLayer, names: Sequence[str]) -> tuple[Any, ...]:
    """Changes whenever the weights, the scale, the dtype or the place of one of the adapters changed."""
    return tuple((name, layer.scaling[name], *map(tensor_state, tensors_of(layer, name))) for name in names)


def combine_biases(layer: LoraLayer, names: Sequence[str], weights: Sequence[float], combined: str) -> None:
    """Set the bias of the adapter `combined` to the weighted sum of what the others' biases add."""
    parts = [
        layer.lora_B[name].bias.detach() * layer.scaling[name] * weight
        for name, weight in zip(names, weights, strict=True)
        if layer.lora_bias.get(name, False)
    ]
    if parts:
        layer.lora_B[combined].bias.data = torch.stack(parts).sum(0)


def low_rank(layer: LoraLayer, name: str) -> LowRank:
    """One adapter's update of a layer, without gradients; convolutions flattened."""
    A, B = matrices_of(layer, name)
    return LowRank(A.detach().flatten(1), B.detach().flatten(1), float(layer.scaling[name]))
