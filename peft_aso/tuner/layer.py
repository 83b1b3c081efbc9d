"""PEFT's LoRA layers on top of a frozen history.

`HistoryLinear` is PEFT's linear LoRA layer that can run with base weight + history as one weight ("folded"). Other
layer types, and weights that cannot be folded, add the history as one low-rank pair ("stacked"). The base weight is
never written to, except by merging.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .history import HistoryError, TaskHistory, psi_matrix
from .low_rank import LowRank, merge_function, sum_updates

UNSUPPORTED_LAYERS = (MultiheadAttention, ParamWrapper)
_FOLDABLE = (nn.Linear, Conv1D)
_EXACT = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


# ---- what a LoRA layer holds ---------------------------------------------------------------------------------------


def adapters_in(layer: LoraLayer, names: Iterable[str]) -> list[str]:
    """Those of `names` that have weights in this layer."""
    linear, embedding = layer.lora_A._modules, layer.lora_embedding_A._keys
    return [name for name in names if name in linear or name in embedding]


def matrices_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_A` `(r, in, ...)` and `lora_B` `(out, r, ...)` of one adapter."""
    if name in layer.lora_A._modules:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def low_rank(layer: LoraLayer, name: str) -> LowRank:
    """One adapter's update of a layer, without gradients; convolutions flattened."""
    A, B = matrices_of(layer, name)
    inputs = layer.task_inputs.get(name)
    return LowRank(A.detach().flatten(1), B.detach().flatten(1), float(layer.scaling[name]), inputs)


def merged_update(updates: Sequence[LowRank], names: Sequence[str], configs: Mapping[str, Any]) -> LowRank:
    """The named adapters' updates of a layer, merged as the config of the last one has it (Eq. 3)."""
    rule, A = configs[names[-1]].merge, updates[0].A
    if rule == "sum":
        return sum_updates(updates)
    exact = [update.to("cpu" if A.device.type == "mps" else A.device, torch.float64) for update in updates]
    return merge_function(rule, names)(exact, psi_matrix(names, configs)).to(A.device, A.dtype)


def bias_of(layer: LoraLayer, names: Iterable[str]) -> torch.Tensor | None:
    """`(out,)`: the sum of the named adapters' scaled LoRA biases; None if they have none."""
    biased = [name for name in names if layer.lora_bias.get(name, False)]
    terms = [layer.lora_B[name].bias.detach() * layer.scaling[name] for name in biased]
    return torch.stack(terms).sum(0) if terms else None


def collect_layers(
    module: nn.Module, name: str, found: dict[str, Any], seen: set[int], kinds: Any = LoraLayer
) -> None:
    """Modules of the given kinds by name, without a walk into the adapters, whose number grows with the tasks."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, kinds):
        found[name] = module
    parts = {"base_layer": module.base_layer} if isinstance(module, LoraLayer) else module._modules
    for child_name, child in parts.items():
        if child is not None:
            collect_layers(child, f"{name}.{child_name}" if name else child_name, found, seen, kinds)


def check_layers(layers: Mapping[str, LoraLayer], adapter: str, history: Sequence[str]) -> None:
    """Refuse layer types whose output is not the base layer's plus the adapter's."""
    for name, layer in layers.items():
        if history and isinstance(layer, UNSUPPORTED_LAYERS) and adapters_in(layer, [*history, adapter]):
            raise HistoryError(
                f"{name} is a {type(layer).__name__}, which cannot have a history. Leave it out of target_modules, or "
                f"add {adapter!r} with history=[]."
            )


def remove_adapter(model: nn.Module, adapter_name: str, active: Sequence[str]) -> None:
    """Remove an adapter from a base model with PEFT's layers in it, and the layers that were made for it alone."""
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and adapter_name in module._all_available_adapter_names():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the adapter that PEFT activates, which is undone here
                module.delete_adapter(adapter_name)
            module._active_adapter = list(active)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            module.delete_adapter(adapter_name, new_active_adapters=list(active))
    for name, module in list(model.named_modules()):
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) and not module._get_available_adapters():
            parent, _, child = name.rpartition(".")
            original = module.base_layer if isinstance(module, LoraLayer) else module.original_module
            setattr(model.get_submodule(parent), child, original)


def untie(model: nn.Module, layers: Iterable[Any]) -> None:
    """Give a layer its own copy of a base weight that other modules use too (tied embeddings), to merge into."""
    holders = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        weight = layer.base_layer._parameters.get("weight")
        if holders[id(weight)] > 1:
            holders[id(weight)] -= 1
            layer.base_layer = copy.copy(layer.base_layer)  # another module may hold the old one
            layer.base_layer._parameters = {**layer.base_layer._parameters, "weight": copy.deepcopy(weight)}


def freeze_history(layer: LoraLayer, history: Collection[str], fixed: Collection[str]) -> None:
    """Declare adapters that are history, and A of those in `fixed`, as frozen through PEFT's
    `frozen_peft_weight_names`.

    PEFT's own variants declare weights there too (MiCA's B). They follow ours in an adapter's entry, so that they are
    left when the adapter is no history any more.
    """
    every = layer.adapter_layer_names
    names = {
        adapter: parts[len(every) :] if parts[: len(every)] == every else parts
        for adapter, parts in layer.frozen_peft_weight_names.items()
    }
    for adapter in fixed:
        names[adapter] = tuple(dict.fromkeys((*names.get(adapter, ()), "lora_A", "lora_embedding_A")))
    for adapter in history:
        names[adapter] = (*every, *names.get(adapter, ()))
    names = {adapter: parts for adapter, parts in names.items() if parts and adapter in layer.scaling}
    if names != layer.frozen_peft_weight_names:
        layer.frozen_peft_weight_names = names
    layer._freeze_non_trainable_peft_weights()


@contextmanager
def active_in(modules: Sequence[Any], names: Sequence[str], head: str | None) -> Iterator[None]:
    """Inside the context these adapters are active in all LoRA layers, and the heads are those of `head`."""
    before = [module._active_adapter for module in modules]
    try:
        for module in modules:
            if isinstance(module, LoraLayer):
                module._active_adapter = list(names)
            elif head is not None:
                module._active_adapter = head if head in module._get_available_adapters() else []
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            module._active_adapter = active


# ---- the history in the forward pass -------------------------------------------------------------------------------


class Stacked(NamedTuple):
    """Several adapters of one layer as one: `x @ A.T @ B.T + bias`."""

    A: torch.Tensor  # (R, in), R = sum of the ranks
    B: torch.Tensor  # (out, R), each adapter's scale multiplied in
    bias: torch.Tensor | None  # (out,), if an adapter has lora_bias


class Folded(NamedTuple):
    """A layer's weight with adapters folded into it: `x @ weight.T + bias`."""

    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None  # (out,), the base layer's and the adapters'


def _stack(layer: LoraLayer, names: Sequence[str], dtype: torch.dtype | None) -> Stacked:
    total = sum_updates([low_rank(layer, name) for name in names])
    bias = bias_of(layer, names)
    return Stacked(total.A.to(dtype=dtype), total.B.to(dtype=dtype), None if bias is None else bias.to(dtype=dtype))


def _fold(layer: Any, names: Sequence[str]) -> Folded:
    base = layer.base_layer
    transposed = isinstance(base, Conv1D)
    total = sum_updates([low_rank(layer, name) for name in names])
    weight = base.weight.detach().T if transposed else base.weight.detach()
    bias, more = base.bias, bias_of(layer, names)
    if more is not None:
        bias = more if bias is None else bias + more
    return Folded(add_product(weight, total.A, total.B), bias)


def add_product(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, factor: float = 1) -> torch.Tensor:
    """`weight + factor * B @ A` `(out, in)`, summed in float32 (float64) and rounded once to the weight's dtype."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    with _no_autocast(weight.device.type):
        return torch.addmm(weight.to(dtype), B.to(dtype), A.to(dtype), alpha=factor).to(weight.dtype)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """What is cached is computed in full precision, also if the first forward pass runs under autocast."""
    return (
        torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
    )


def half_autocast(device_type: str) -> torch.dtype | None:
    """The half precision of autocast at the moment, or None."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # "meta" has no autocast
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return dtype if dtype in _HALF else None


def can_fold(layer: Any) -> bool:
    """Whether the layer can run with another weight in place of its base layer's."""
    base = layer.base_layer
    weight = base._parameters.get("weight") if type(base) in _FOLDABLE else None
    # quantized, sharded and fake tensors are classes of their own; an offloaded weight is on the meta device
    if type(weight) is not nn.Parameter or weight.dtype not in (*_EXACT, *_HALF) or weight.is_meta:
        return False
    replaced = "forward" in base.__dict__ or base._compiled_call_impl is not None or "_hf_hook" in layer.__dict__
    return not (weight.requires_grad or replaced or base._forward_hooks or base._forward_pre_hooks)


def _folded_for(layer: HistoryLinear, x: torch.Tensor, history: Sequence[str], active: Sequence[str]) -> Folded | None:
    """Base weight, history and, inside `ASOLoraModel.folded`, active adapters as one weight; None if not possible."""
    tasks: Any = layer.task_history
    form = tasks.configs[active[0]].history_form if active else "auto"
    fold_active = tasks.fold_active and not layer.training
    if form == "stacked" and not fold_active or tasks.sharded or torch.compiler.is_compiling():
        return None
    if any(name in layer.lora_variant for name in active) or not can_fold(layer):
        return None
    rounds = layer.base_layer.weight.dtype not in _EXACT or half_autocast(x.device.type) is not None
    if rounds and (form != "folded" or fold_active):
        return None
    names = adapters_in(layer, (*history, *active) if fold_active else history)
    return _cached(layer, ("folded", tuple(names)), names, lambda: _fold(layer, names)) if names else None


def _stacked_for(layer: Any, x: torch.Tensor, names: Sequence[str]) -> Stacked:
    half = half_autocast(x.device.type) or (x.dtype if x.dtype in _HALF else None)
    if torch.compiler.is_compiling():  # the graph reads the weights themselves
        return _stack(layer, names, None)
    if layer.task_history.sharded:  # gathered for this pass only
        return _stack(layer, names, half)
    return _cached(layer, ("stacked", tuple(names), half), names, lambda: _stack(layer, names, half))


def _cached(layer: Any, key: tuple[Any, ...], names: Sequence[str], make: Callable[[], Any]) -> Any:
    """`make()` for this generation of the history; scales can change without a call of the tuner."""

    def without_gradients() -> Any:
        # tensors made in inference mode could not be used in training afterwards
        with torch.inference_mode(False), torch.no_grad():
            return make()

    return layer.task_history.cached(layer, (*key, [layer.scaling[name] for name in names]), without_gradients)


def history_output(layer: Any, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor | None:
    """The sum of the named frozen adapters' outputs for the layer's input `x`; None if none has weights here."""
    names = adapters_in(layer, names)
    if not names:
        return None
    if not layer.lora_embedding_A and not isinstance(layer.lora_A[names[0]], nn.Linear):  # a convolution
        cast = layer._cast_input_dtype(x, layer.lora_A[names[0]].weight.dtype)
        outputs = [layer.lora_B[name](layer.lora_A[name](cast)) * layer.scaling[name] for name in names]
        return torch.stack(outputs).sum(0)
    stacked = _stacked_for(layer, x, names)
    if layer.lora_embedding_A:
        output = F.linear(F.embedding(x, stacked.A.T), stacked.B)
        scale = layer._get_embed_scale()
        return output if scale is None else output * scale.to(output.dtype)
    return F.linear(F.linear(layer._cast_input_dtype(x, stacked.A.dtype), stacked.A), stacked.B, stacked.bias)


def add_history(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """A layer's output plus its history's. A forward hook of every layer that is no `HistoryLinear`."""
    if layer.disable_adapters or layer.merged:
        return output
    tasks: TaskHistory = layer.task_history
    batch_names = kwargs.get("adapter_names")
    history = tasks.in_forward(layer.active_adapters if batch_names is None else (), layer.training)
    if not history and batch_names is None:
        return output
    x = args[0] if args else kwargs["x"]
    if batch_names is None:
        part = history_output(layer, x, history)
        return output if part is None else output + part.to(output.dtype)
    for name in dict.fromkeys(batch_names):  # a mixed batch: each row has its task's history
        rows = torch.tensor([row for row, other in enumerate(batch_names) if other == name], device=output.device)
        history = () if name == "__base__" else tasks.in_forward((name,), layer.training)
        part = history_output(layer, x[rows.to(x.device)], history)
        if part is not None:
            output = output.index_add(0, rows, part.to(output.dtype))
    return output


class HistoryLinear(lora.Linear):
    """`peft.tuners.lora.layer.Linear` on top of a frozen history."""

    task_history: TaskHistory | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer, the history and the active adapters: Eq. 3 with the sum over the tasks so far."""
        tasks = self.task_history
        if tasks is None or self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            output = super().forward(x, *args, **kwargs)
            return output if tasks is None else add_history(self, (x,), kwargs, output)
        active = self.active_adapters
        history = tasks.in_forward(active, self.training)
        folded = None
        if (history or tasks.fold_active) and not args and not kwargs:
            folded = _folded_for(self, x, history, active)
        if folded is None:
            output = super().forward(x, *args, **kwargs)
            part = history_output(self, x, history) if history else None
            return output if part is None else output + part.to(output.dtype)
        output = F.linear(x, folded.weight, folded.bias)
        if tasks.fold_active and not self.training:
            return output
        result = output
        for name in adapters_in(self, active):
            inputs = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            result = (
                result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](inputs))) * self.scaling[name]
            )
        return result.to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, with one product of all adapters' ranks and one rounding.

        Raises:
            ValueError: with `safe_merge`, the merged weights would hold NaN or Inf; this layer is as before then.
        """
        names = adapters_in(self, check_adapters_to_merge(self, adapter_names))
        if self._needs_one_product(names):
            self._add_to_base(names, 1, safe_merge)
            self.merged_adapters.extend(names)
        else:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """As PEFT's, with one product of all adapters' ranks."""
        names = adapters_in(self, self.merged_adapters)
        if self._needs_one_product(names):
            self._add_to_base(names, -1, False)
            self.merged_adapters.clear()
        else:
            super().unmerge()

    def _needs_one_product(self, names: Sequence[str]) -> bool:
        """Whether PEFT's merging, which adds one adapter after the other, is not used."""
        tasks = self.task_history
        weighted = bool(names) and tasks is not None and isinstance(tasks.configs[names[-1]].merge, Mapping)
        return (len(names) > 1 or weighted) and self.can_merge_at_once(names)

    def can_merge_at_once(self, names: Sequence[str]) -> bool:
        """Whether the named adapters are plain low-rank updates of a floating point weight."""
        base = self.base_layer
        weight = base._parameters.get("weight") if type(base) in _FOLDABLE else None
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            return False
        biased = any(self.lora_bias.get(name, False) for name in names)
        return not any(name in self.lora_variant for name in names) and not (biased and base.bias is None)

    @torch.no_grad()
    def _add_to_base(self, names: Sequence[str], sign: int, check: bool) -> None:
        base = self.base_layer
        updates = [low_rank(self, name) for name in names]
        tasks = self.task_history
        total = sum_updates(updates) if tasks is None else merged_update(updates, names, tasks.configs)
        transposed, more = isinstance(base, Conv1D), bias_of(self, names)
        weight = base.weight.T if transposed else base.weight
        weight = add_product(weight, total.A, total.B, sign * total.scale)
        bias = base.bias if more is None else (base.bias + sign * more).to(base.bias.dtype)
        if check and not all(part is None or torch.isfinite(part).all() for part in (weight, bias)):
            broken = [name for name in names if not all(part.isfinite().all() for part in matrices_of(self, name))]
            reason = (
                f"The adapter {broken[0]} seems to be broken" if broken else "The sum of the adapters is too large"
            )
            raise ValueError(f"NaNs detected in the merged weights. {reason}")
        base.weight.copy_(weight.T if transposed else weight)
        if more is not None:
            base.bias.copy_(bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HistoryLinear:
        self._raise_generation()  # .to(), .half(), .cuda()
        result: HistoryLinear = super()._apply(fn, recurse)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._raise_generation()
        super()._load_from_state_dict(*args, **kwargs)

    def _raise_generation(self) -> None:
        if self.task_history is not None:
            self.task_history.generation += 1
