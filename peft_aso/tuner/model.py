"""`ASOLoraModel`: PEFT's LoRA tuner with a history.

An adapter's name stands for "this task on top of its history" wherever PEFT takes a name: activating a task
activates its history in the forward pass, and merging it merges its history. The history is frozen, always: an
adapter that is in some other adapter's history never trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .checks import check_adapter_name, check_chain, check_layers, check_weights
from .psi import CoefficientStore
from .history import HistoryError, TaskHistory, adapter_of, settle_history, task_name_of
from .layer import adapters_in, attach_history, fingerprint, matrices_of, subspace_of
from .orthogonality import FrozenGroup, group_history, norm_penalty, orthogonality_penalty, project_out
from .persistence import ATTRIBUTION_KEY, take_attribution, tuner_of, with_attribution


class ASOLoraModel(LoraModel):
    """A base model with one LoRA adapter a task; each task runs on top of its frozen history.

    Made by `get_peft_model(model, ASOLoraConfig(...))`, where it is `model.base_model`. Everything that
    [`~peft.LoraModel`] does works; this class adds the history, the penalty of Eq. 7 and the coefficients of Eq. 6.

    Attributes:
        tasks (`TaskHistory`):
            Which adapters are the history of which.
        attribution (`dict[str, torch.Tensor]`):
            Adapter -> its stored attribution vector `(N,)`, the mean over its own task's probe. Saved with it.
    """

    # PEFT hands the bare base model back from inject_adapter_in_model; the history lives on this object, so that
    # door must stay shut (PEFT raises an error that says so)
    uses_shared_state: bool = True

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.tasks = TaskHistory()
        self.attribution: dict[str, torch.Tensor] = {}
        self._coefficients = CoefficientStore()
        self._groups: tuple[Any, list[FrozenGroup]] | None = None
        self._adding_combined = False

    # ---- adapters come and go --------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter (PEFT calls this from `get_peft_model`, `add_adapter` and `load_adapter`)."""
        config = self.peft_config[adapter_name]
        if self._adding_combined:
            config.history, config.combined, config.task_name = [], True, None
        check_adapter_name(adapter_name, model)
        settle_history(adapter_name, self.peft_config)
        history = tuple(filter(None, (adapter_of(t, self.peft_config, adapter_name) for t in config.history)))
        check_chain(adapter_name, history, self.peft_config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        check_layers(self.lora_layers(), adapter_name, history)
        self._sync_history()
        if config.project_init and config.peft_aso_version is None:
            self._project_init(adapter_name)
        if adapter_name in self.tasks.missing:
            warnings.warn(
                f"The adapter {adapter_name!r} was trained on top of {list(self.tasks.missing[adapter_name])}, which "
                "this model does not hold yet. Load them before running it (peft_aso.load_chain loads a whole "
                "chain); until then its forward pass is an error.",
                stacklevel=3,
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter that no other adapter is built on.

        Raises:
            HistoryError: the adapter is in another adapter's history.
        """
        dependents = self.tasks.dependents(adapter_name) if adapter_name in self.peft_config else []
        if dependents:
            raise HistoryError(
                f"{adapter_name!r} cannot be deleted: {', '.join(map(repr, dependents))} was trained on top of it. "
                "Delete those first (the newest first)."
            )
        if adapter_name in self.active_adapters and len(self.peft_config) > 1:
            remaining = [name for name in self.peft_config if name != adapter_name]
            previous = [name for name in self.tasks.histories[adapter_name] if name in remaining]
            successor = (previous or remaining)[-1]
            warnings.warn(f"The active adapter {adapter_name!r} is deleted; {successor!r} is active now.", stacklevel=2)
            self.set_adapter(successor)
        super().delete_adapter(adapter_name)
        self.attribution.pop(adapter_name, None)
        self._coefficients.forget(adapter_name)
        self._sync_history()

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any) -> None:
        """As `LoraModel.add_weighted_adapter`, on the named adapters' own weights (without their history).

        The new adapter is no task: its history is empty and it never becomes another task's history by itself.
        """
        if adapter_name in self.peft_config:
            return
        self._adding_combined = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, **kwargs)
        finally:
            self._adding_combined = False
        # the weights are combined for a scale of 1; a copied use_rslora would make that r / sqrt(r)
        self.peft_config[adapter_name].use_rslora = False
        for layer in self.lora_layers().values():
            if adapters_in(layer, [adapter_name]):
                layer.scaling[adapter_name] = 1.0
                layer.use_rslora[adapter_name] = False

    def _sync_history(self) -> None:
        """After adapters came or went: resolve names, tell the layers, freeze the history."""
        before = self.tasks.frozen
        self.tasks.refresh(self.peft_config)
        for layer in self.lora_layers().values():
            attach_history(layer, self.tasks)
            kept = {name: value for name, value in layer.frozen_peft_weight_names.items() if name not in before}
            layer.frozen_peft_weight_names = kept | {n: layer.adapter_layer_names for n in self.tasks.frozen}
        self._freeze_history()

    def _project_init(self, adapter_name: str) -> None:
        for layer in self.lora_layers().values():
            history = adapters_in(layer, self.tasks.histories[adapter_name])
            if history and adapters_in(layer, [adapter_name]):
                rows = [subspace_of(layer, name) for name in history]
                matrix = matrices_of(layer, adapter_name)[0]
                if matrix.device.type != "meta":
                    with torch.no_grad():
                        matrix.copy_(project_out(matrix.flatten(1), rows).view_as(matrix))

    # ---- what is active, what trains ---------------------------------------------------------------------------

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Module name (as in the base model) -> LoRA layer, in the model's order."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def _freeze_history(self) -> None:
        frozen = self.tasks.frozen
        if not frozen:
            return
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module._freeze_non_trainable_peft_weights(list(frozen))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.set_requires_grad(list(frozen), False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate a task on top of its history. Only the task trains, and only if nothing is built on it."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._freeze_history()

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
        """
        with self._temporarily([adapter_name], alone=True):
            yield

    @contextmanager
    def through(self, adapter_name: str) -> Iterator[None]:
        """Inside the context the model is as it stood when this task ended: base + its history + its adapter."""
        with self._temporarily([adapter_name], alone=False):
            yield

    @contextmanager
    def _temporarily(self, names: list[str], alone: bool) -> Iterator[None]:
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"There is no adapter {name!r}. The model holds: {', '.join(self.peft_config)}.")
        modules = [m for m in self.model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]
        if any(getattr(module, "merged", False) for module in modules):
            raise ValueError("The adapters are merged into the base weights. Call model.unmerge_adapter() first.")
        held = [(module, module._active_adapter) for module in modules]
        active, was_alone = self.active_adapter, self.tasks.alone
        try:
            self.active_adapter = names[0]
            self.tasks.alone = alone
            for module in modules:
                is_layer = isinstance(module, LoraLayer)
                module._active_adapter = list(names) if is_layer else _head_of(module, names[0])
            yield
        finally:
            self.active_adapter, self.tasks.alone = active, was_alone
            for module, value in held:
                module._active_adapter = value

    # ---- merging -----------------------------------------------------------------------------------------------

    @contextmanager
    def _history_active(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Let PEFT's merging, which takes the active adapters, see the tasks and their history."""
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self.tasks.require(names)
        expanded = self.tasks.expand(names)
        heads = [n for n in expanded if n not in names and getattr(self.peft_config[n], "modules_to_save", None)]
        if heads:
            warnings.warn(
                f"modules_to_save of {heads} are left out of the merged model: task heads are not summed, the merged "
                f"model has the one of {names}.",
                stacklevel=4,
            )
        modules = [m for m in self.model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]
        held = [(module, module._active_adapter) for module in modules]
        try:
            for module in modules:
                if isinstance(module, LoraLayer):
                    module._active_adapter = expanded
                elif adapter_names is not None:
                    module._active_adapter = _head_of(module, names[-1])
            yield
        finally:
            for module, value in held:
                module._active_adapter = value

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge tasks with their history into the base weights (Eq. 3); `None`: the active task."""
        with self._history_active(adapter_names):
            super().merge_adapter(adapter_names=None, safe_merge=safe_merge)

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

    # ---- the penalty (Eq. 5-7) and its coefficients --------------------------------------------------------------

    @property
    def soft_coefficients(self) -> dict[str, Any]:
        """psi of each earlier task for the current one (Eq. 6): `{"dbpedia": 0.37}`; 1.0 before the first update.

        With one psi a layer, each value is a list over the layers.
        """
        return self._coefficients.as_dict(self.current_task, self.history)

    def set_soft_coefficients(
        self, psi: Mapping[str, Any], layer_of: Mapping[str, int] | None = None, similarities: Any = None
    ) -> None:
        """Set psi of the current task.

        Args:
            psi: adapter or task name -> psi (a number, or one number a layer), for each task of the history.
            layer_of: LoRA module name -> layer (column), when psi has one number a layer.
            similarities: the w that psi came from, kept in the adapter's config beside it.

        Raises:
            ValueError: a task of the history is missing in `psi`, an unknown one is in it, or a value is not finite.
        """
        config = self.peft_config[self.current_task]
        values = {adapter_of(name, self.peft_config) or name: value for name, value in psi.items()}
        self._coefficients.set(self.current_task, self.history, values, layer_of)
        config.soft_coefficients = {self.task_name(name): value for name, value in self.soft_coefficients.items()}
        if similarities is not None:
            config.similarities = dict(similarities)

    def orthogonality_penalty(self) -> torch.Tensor:
        """Eq. 7 without lambda for the current task: a float32 scalar with gradients to its A; 0 without history.

        Raises:
            MissingHistoryError: a task of the history is not loaded.
            HistoryError: an earlier task shares no module with the current one.
        """
        task = self.current_task
        self.tasks.require([task])
        current = {n: subspace_of(layer, task) for n, layer in self.lora_layers().items() if adapters_in(layer, [task])}
        psi, layer_of = self._coefficients.tensor(task, self.history, next(iter(current.values())).device)
        if not self.history:
            return torch.zeros((), device=psi.device)
        form = self.peft_config[task].penalty
        return orthogonality_penalty(self._history_groups(task, current), current, psi, form, layer_of)

    def check_shared_modules(self) -> None:
        """Raise `HistoryError` if a task of the history shares no module with the current task."""
        layers = self.lora_layers().values()
        task = self.current_task
        for old in self.history:
            if not any(len(adapters_in(layer, [old, task])) == 2 for layer in layers):
                raise HistoryError(
                    f"{old!r} and {task!r} have no module in common, so there is nothing to hold orthogonal between "
                    f"them. Give {task!r} a target module of {old!r}, leave {old!r} out of its history, or set "
                    "penalty_weight=0."
                )

    def norm_penalty(self) -> torch.Tensor:
        """Sum of the norms of the current adapter's matrices: the term that `l2_weight` weighs."""
        layers = [layer for layer in self.lora_layers().values() if adapters_in(layer, [self.current_task])]
        return norm_penalty([matrix for layer in layers for matrix in matrices_of(layer, self.current_task)])

    def _history_groups(self, task: str, current: Mapping[str, torch.Tensor]) -> list[FrozenGroup]:
        """The history's rows by shape, stacked once and again only when an adapter of the history has changed."""
        layers = {name: self.model.get_submodule(name) for name in current}
        order = {name: index for index, name in enumerate(self.history)}
        present = {name: adapters_in(layer, order) for name, layer in layers.items()}
        key = (task, *(fingerprint(layer, present[name]) for name, layer in layers.items()))
        if self._groups is None or self._groups[0] != key:
            self.check_shared_modules()
            rows = {
                name: [(order[old], subspace_of(layer, old)) for old in present[name]] for name, layer in layers.items()
            }
            self._groups = (key, group_history(rows, current))
        return self._groups[1]

    # ---- saving and loading: the attribution vector travels with the adapter ---------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return with_attribution(state_dict, tuner_of(model), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        vector = state_dict.pop(ATTRIBUTION_KEY, None)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = tuner_of(model)
        try:
            check_weights(remapped, model, adapter_name)
            take_attribution(tuner, adapter_name, config, vector)
        except ValueError:
            if tuner is not None and len(tuner.peft_config) > 1 and not tuner.tasks.dependents(adapter_name):
                model.delete_adapter(adapter_name)  # nothing half-loaded stays behind
            raise
        return remapped

    def task_name(self, adapter_name: str) -> str:
        """The task that an adapter holds, as saved in its config."""
        return task_name_of(adapter_name, self.peft_config[adapter_name])


def _head_of(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> list[str]:
    """The adapter as an auxiliary wrapper's active one, if it has a module of its own there."""
    return [adapter_name] if adapter_name in wrapper._adapters else []
