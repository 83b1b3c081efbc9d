"""PEFT's linear LoRA layer, which can run with its history folded into the base weight, and merges in one product.

The base weight is never written to (merging apart): a folded weight lies beside it, and a forward pass runs on a
shadow of the layer, made for this pass, whose base layer has the folded weight. So saving, tied weights, copies,
switched-off adapters and several threads see the base weight as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .forms import (
    FoldedHistory,
    Form,
    FormCache,
    build,
    fold_obstacle,
    half_autocast,
    merge_pair,
    rounds,
    stack,
)
from .forward import add_form, add_history, form_in_forward
from .history import TaskHistory
from .kept import GLANCE
from .layer import adapters_in
from .merging import Buffers, add_in_place, plain_sum

_LEAVES = (nn.Linear, nn.Dropout, nn.Identity)  # what A, B and the dropout of an adapter are


class HistoryLinear(lora.Linear):
    """`peft.tuners.lora.layer.Linear` on top of a frozen history."""

    task_history: TaskHistory | None = None
    history_cache: FormCache
    whole_cache: FormCache

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer, the active adapter and its history."""
        plain = super().forward
        tasks = self.task_history
        if tasks is None or self.disable_adapters or self.merged:
            return plain(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            return add_history(self, (x,), kwargs, plain(x, *args, **kwargs))
        whole = self._whole(x, tasks) if tasks.as_one else None
        if isinstance(whole, FoldedHistory):
            return lora.Linear.forward(self._shadow(whole, []), x, *args, **kwargs)
        glance = GLANCE if self.training else None
        form = form_in_forward(self, x, tuple(self.active_adapters), can_fold=True, glance=glance)
        if isinstance(form, FoldedHistory):
            return lora.Linear.forward(self._shadow(form, self._active_adapter), x, *args, **kwargs)
        output = plain(x, *args, **kwargs)
        return output if form is None else output + add_form(self, x, form).to(output.dtype)

    def _whole(self, x: torch.Tensor, tasks: TaskHistory) -> Form | None:
        """Base weight, history and active adapters as one weight, where that is exact; else None."""
        active = tuple(self.active_adapters)
        if self.training or torch.compiler.is_compiling() or tasks.sharded or fold_obstacle(self) is not None:
            return None
        if rounds(self, half_autocast(x.device.type)) or any(name in self.lora_variant for name in active):
            return None
        names = (*tasks.in_forward(active, False), *active)
        return self.whole_cache.get(
            self, names, (active,), lambda present: self._build_whole(x, active, present), with_base=True
        )

    def _build_whole(self, x: torch.Tensor, active: tuple[str, ...], present: list[str]) -> Form:
        form = form_in_forward(self, x, active, can_fold=True)
        rest = adapters_in(self, active)
        if not isinstance(form, FoldedHistory) or not rest:
            return form if isinstance(form, FoldedHistory) else build(self, present, "folded", None)
        pair = stack(self, rest)  # most often one adapter of a small rank: the history is there already
        biases = [bias for bias in (form.bias, pair.bias) if bias is not None]
        weight = merge_pair(form.weight, pair, isinstance(self.base_layer, Conv1D))
        return FoldedHistory(weight, torch.stack(biases).sum(0) if biases else None)

    def _shadow(self, folded: FoldedHistory, active: str | list[str]) -> HistoryLinear:
        """This layer for one forward pass: the same parts, but for the base layer's weight."""
        base = self.base_layer
        parameters = {**base._parameters, "weight": folded.weight}
        if folded.bias is not None:
            parameters["bias"] = folded.bias if base.bias is None else base.bias + folded.bias
        shadow_base = _alias(base, _parameters=parameters)
        return _alias(self, _modules={**self._modules, "base_layer": shadow_base}, _active_adapter=active)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._written()
        super()._load_from_state_dict(*args, **kwargs)

    def _written(self) -> None:
        """What was made from the weights is made again."""
        clear_forms(self)
        if self.task_history is not None:
            self.task_history.writes += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HistoryLinear:
        self._written()  # a model that goes to another device or dtype leaves nothing behind
        result: HistoryLinear = super()._apply(fn, recurse)
        return result

    def train(self, mode: bool = True) -> HistoryLinear:
        """As torch's, without a call for each of an adapter's parts: trainers call it in each step."""
        self.training = mode
        for child in self.children():
            if type(child) is nn.ModuleDict and _only_leaves(child):
                for module in (child, *child._modules.values()):
                    module.__dict__["training"] = mode
            else:
                child.train(mode)
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, same order, without a generator for each of an adapter's parts."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self._modules.items():
            path = f"{prefix}.{name}" if prefix else name
            if type(child) is not nn.ModuleDict or child in memo or not _only_leaves(child):
                if child is not None:
                    yield from child.named_modules(memo, path, remove_duplicate)
                continue
            yield path, child
            if remove_duplicate:
                memo.add(child)
            for part, module in child._modules.items():
                if module not in memo:
                    if remove_duplicate:
                        memo.add(module)
                    yield f"{path}.{part}", module

    # ---- merging -----------------------------------------------------------------------------------------

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, buffers: Buffers | None = None
    ) -> None:
        """As PEFT's, with one product for all adapters and one rounding.

        Args:
            buffers: memory to work in, for whoever merges many layers.

        Raises:
            ValueError: with `safe_merge`, the merged weights would hold NaN or Inf; this layer is as before then.
        """
        clear_forms(self)
        wanted = self.active_adapters if adapter_names is None else adapter_names
        present = adapters_in(self, [name for name in wanted if name not in self.merged_adapters])
        parts = None if isinstance(adapter_names, str) or not present else plain_sum(self, present)
        if parts is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        check_adapters_to_merge(self, adapter_names)  # PEFT's warnings
        add_in_place(self, parts, 1, safe_merge, buffers or Buffers())
        self.merged_adapters.extend(present)

    def unmerge(self, buffers: Buffers | None = None) -> None:
        """As PEFT's, with one product for all adapters."""
        clear_forms(self)
        present = adapters_in(self, self.merged_adapters)
        parts = plain_sum(self, present) if present else None
        if parts is None:
            super().unmerge()
            return
        add_in_place(self, parts, -1, False, buffers or Buffers())
        self.merged_adapters.clear()


def _alias(module: Any, **changes: Any) -> Any:
    """The module under another identity, with a few attributes changed; everything else is shared, hooks too."""
    alias = object.__new__(type(module))
    alias.__dict__.update(module.__dict__)
    alias.__dict__.update(changes)
    return alias


def _only_leaves(parts: nn.ModuleDict) -> bool:
    """Whether these are parts of adapters as PEFT makes them, without modules of their own."""
    return all(type(part) in _LEAVES and not part._modules for part in parts._modules.values())


def with_folding(module: nn.Module) -> nn.Module:
    """A new LoRA layer as it came from PEFT; a plain linear one as `HistoryLinear`."""
    if type(module) is lora.Linear:
        module.__class__ = HistoryLinear
    return module


def clear_forms(layer: lora.LoraLayer) -> None:
    """Free what is kept of the history; the next forward pass makes it again."""
    for cache in ("history_cache", "whole_cache"):
        if cache in layer.__dict__:
            layer.__dict__[cache].clear()


def attach_history(layer: lora.LoraLayer, tasks: TaskHistory) -> None:
    """Make the layer add its history's output. Calling it again changes nothing but which tasks there are."""
    attached = "history_cache" in layer.__dict__
    layer.task_history = tasks
    if not attached:
        layer.history_cache, layer.whole_cache = FormCache(), FormCache()
        layer.declared_frozen = {}
        if not isinstance(layer, HistoryLinear):
            layer.register_forward_hook(add_history, with_kwargs=True)
