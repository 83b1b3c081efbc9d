"""Which task is active, on top of which history; what trains; and merging, which takes what is active.

An adapter's name stands for "this task on top of its history" wherever PEFT takes a name.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..sharding import gathered, is_sharded, may_shard
from .forms import fold_obstacle
from .history import HistoryError, TaskHistory
from .layer import adapters_in, modules_outside
from .linear import HistoryLinear, clear_forms
from .merging import Buffers


class ActiveTask(LoraModel):
    """PEFT's LoRA tuner with a history under the active adapter, which is frozen after every call of PEFT's.

    Attributes:
        tasks (`TaskHistory`):
            Which adapters are the history of which.
    """

    active_adapter: str | list[str]

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.tasks = TaskHistory()

    # ---- what is active, what trains ---------------------------------------------------------------------

    def lora_layers(self, names: Collection[str] | None = None) -> dict[str, LoraLayer]:
        """Module name (as in the base model) -> LoRA layer, in the model's order; with one of `names`, if given."""
        layers = {name: module for name, module in modules_outside(self.model) if isinstance(module, LoraLayer)}
        return layers if names is None else {name: each for name, each in layers.items() if adapters_in(each, names)}

    def _wrappers(self) -> list[Any]:
        """The modules that have an active adapter of their own: LoRA layers, copied heads."""
        kinds = (LoraLayer, AuxiliaryTrainingWrapper)
        return [module for _, module in modules_outside(self.model) if isinstance(module, kinds)]

    def _freeze_history(self) -> None:
        frozen, fixed = list(self.tasks.frozen), self.tasks.fixed
        for module in self._wrappers() if frozen or fixed else ():
            if isinstance(module, LoraLayer):
                module._freeze_non_trainable_peft_weights([*frozen, *fixed])
            else:
                module.set_requires_grad(frozen, False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate a task on top of its history. Only the task trains, and only if nothing is built on it."""
        self.tasks.refresh(self.peft_config)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._refuse_unfoldable(names)
        if names != self.active_adapters:
            self._clear_forms()
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._freeze_history()

    @property
    def is_merged(self) -> bool:
        """Whether any adapter is merged into the base weights."""
        return any(layer.merged for layer in self.lora_layers().values())

    def _refuse_unfoldable(self, adapter_names: Sequence[str]) -> None:
        """Refuse `history_form="folded"` where not one of the modules can be folded."""
        for name in adapter_names:
            if self.tasks.forms.get(name) != "folded" or not self.tasks.histories[name]:
                continue
            obstacles = {
                f"{module}: {fold_obstacle(layer) if isinstance(layer, HistoryLinear) else _unfoldable(layer)}"
                for module, layer in self.lora_layers().items()
                if not isinstance(layer, HistoryLinear) or fold_obstacle(layer) is not None
            }
            if obstacles and len(obstacles) == len(self.lora_layers()):
                raise HistoryError(
                    f"The history of {name!r} cannot be folded into this model ({min(obstacles)}). Set "
                    f'model.peft_config[{name!r}].history_form = "auto", which takes another form here.'
                )

    def note_sharding(self) -> None:
        """Find out whether FSDP2 shards the weights, which it may do at any time after the model was made."""
        if not may_shard():
            return
        parts = (part for layer in self.lora_layers().values() for part in (layer.lora_A, layer.lora_embedding_A))
        sharded = any(is_sharded(weight) for part in parts for weight in islice(part.parameters(), 1))
        if sharded and not self.tasks.sharded:
            self._clear_forms()
        self.tasks.sharded = self.tasks.sharded or sharded

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside the context all weights are whole in each process, where FSDP2 shards them: parts of the model can be
        called one by one. All processes enter it together; it takes the memory of the whole model in each."""
        self.note_sharding()
        if not self.tasks.sharded:
            yield
            return
        self.tasks.sharded = False
        try:
            with gathered(self.model):
                yield
        finally:
            self._clear_forms()
            self.tasks.sharded = True

    def _clear_forms(self) -> None:
        """Free what the layers keep of the history: another task is active, or the base weights change."""
        for layer in self.lora_layers().values():
            clear_forms(layer)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's; the history stays frozen whatever is asked for."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_history()

    def enable_adapter_layers(self) -> None:
        """As PEFT's; the history stays frozen."""
        super().enable_adapter_layers()
        self._freeze_history()

    @property
    def current_task(self) -> str:
        """The active adapter.

        Raises:
            ValueError: not exactly one adapter is active.
        """
        if len(self.active_adapters) != 1:
            raise ValueError(
                f"This needs exactly one active task, and {self.active_adapters} are active. Call set_adapter."
            )
        return self.active_adapters[0]

    @property
    def history(self) -> tuple[str, ...]:
        """The adapters of the current task's history, oldest first."""
        return self.tasks.histories[self.current_task]

    @contextmanager
    def only(self, adapter_name: str) -> Iterator[None]:
        """Inside the context the model is base + this adapter alone (Eq. 2).

        What was active and what trains is as before afterwards; `requires_grad` is not touched at all.

        Raises:
            ValueError: no such adapter (the adapter's name, not the task's, where they differ), or merged adapters.
        """
        with self._temporarily(adapter_name, alone=True):
            yield

    @contextmanager
    def through(self, adapter_name: str) -> Iterator[None]:
        """Inside the context the model is as it stood when this task ended: base, history and adapter.

        Raises:
            ValueError: as `only`.
        """
        with self._temporarily(adapter_name, alone=False):
            yield

    @contextmanager
    def _temporarily(self, adapter_name: str, alone: bool) -> Iterator[None]:
        self._check_names([adapter_name])
        modules = self._wrappers()
        if any(getattr(module, "merged", False) for module in modules):
            raise ValueError("The adapters are merged into the base weights. Call model.unmerge_adapter() first.")
        held = [(module, module._active_adapter) for module in modules]
        active, was_alone = self.active_adapter, self.tasks.alone
        try:
            self.active_adapter, self.tasks.alone = adapter_name, alone
            for module in modules:
                is_layer = isinstance(module, LoraLayer)
                module._active_adapter = [adapter_name] if is_layer else _head_of(module, adapter_name)
            yield
        finally:
            self.active_adapter, self.tasks.alone = active, was_alone
            for module, value in held:
                module._active_adapter = value

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Inside the context, and in evaluation mode, each module runs as one product: base weight, history and
        active adapter in one matrix.

        For looking at a model many times without training it. No gradient reaches the adapter's weights inside;
        gradients to activations are as ever. Modules where one matrix is not the same sum in float32 (half precision,
        quantized weights, embeddings, DoRA) run as usual. `only` and `through` work inside and around. The matrices
        are freed at the end.
        """
        was_as_one, self.tasks.as_one = self.tasks.as_one, True
        try:
            yield
        finally:
            self.tasks.as_one = was_as_one
            if not was_as_one:
                for layer in self.lora_layers().values():
                    layer.whole_cache.clear()

    def _check_names(self, adapter_names: Sequence[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"There is no adapter {', '.join(map(repr, unknown))}. The model holds: "
                f"{', '.join(map(repr, self.peft_config)) or 'none'}."
            )

    # ---- merging -----------------------------------------------------------------------------------------

    @contextmanager
    def _history_active(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Let PEFT's merging, which takes the active adapters, see the tasks and their history."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names={adapter_names!r}: give a list of names, [{adapter_names!r}].")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._check_names(names)
        self.tasks.require(names)
        expanded = self.tasks.expand(names)
        heads = [n for n in expanded if n not in names and self.peft_config[n].modules_to_save]
        if heads:
            warnings.warn(
                f"modules_to_save of {heads} are left out of the merged model: task heads are not summed, "
                f"the merged model has the one of {names}.",
                stacklevel=4,
            )
        modules = self._wrappers()
        held = [(module, module._active_adapter) for module in modules]
        try:
            for module in modules:
                if isinstance(module, LoraLayer):
                    module._active_adapter = expanded
                elif adapter_names:
                    module._active_adapter = _head_of(module, names[-1])
            yield
        finally:
            for module, value in held:
                module._active_adapter = value

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge tasks with their history into the base weights (Eq. 3); `None`: the active task.

        Raises:
            ValueError: an unknown adapter.
            MissingHistoryError: a task of the history is not loaded.
        """
        self._clear_forms()
        with self._history_active(adapter_names):
            modules = [module for _, module in modules_outside(self.model)]
            if any("_hf_hook" in module.__dict__ for module in modules):
                super().merge_adapter(adapter_names=None, safe_merge=safe_merge)
                return
            self._check_merge_allowed()  # the same without looking for offloaded weights in each adapter
            buffers = Buffers()
            for module in modules:
                if isinstance(module, HistoryLinear):
                    module.merge(safe_merge, None, buffers)
                elif isinstance(module, BaseTunerLayer):
                    module.merge(adapter_names=None, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out of the base weights again."""
        self._clear_forms()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        with self._history_active(adapter_names):
            return super()._unload_and_optionally_merge(progressbar=progressbar, safe_merge=safe_merge)


def _unfoldable(layer: Any) -> str:
    base = layer.get_base_layer()
    weight = type(getattr(base, "weight", None)).__name__
    return f"{type(base).__name__} with a {weight}, a quantized weight or no linear layer"


def _head_of(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> Any:
    """The adapter as an auxiliary wrapper's active one, if it has a module of its own there."""
    return adapter_name if adapter_name in wrapper._adapters else []
