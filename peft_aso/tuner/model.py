"""`ASOLoraModel`: PEFT's LoRA tuner with a history, the penalty of Eq. 7 and the soft coefficients of Eq. 6.

An adapter's name means "this task on top of its history" wherever PEFT takes a name: activating a task activates its
history in the forward pass, and merging it merges its history. The history is frozen: an adapter that is in some other
adapter's history never trains.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _check_adapters_not_merged
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..sharding import full_tensor, gathered, is_sharded, may_shard
from .adapter_file import (
    ATTRIBUTION_KEY,
    check_attribution,
    check_tensors,
    is_finite,
    is_own_key,
    store_inputs,
    stored_inputs,
    tensors_of,
    weights_hash,
)
from .history import (
    HistoryError,
    TaskHistory,
    adapter_of,
    check_adapter_name,
    check_base_unchanged,
    check_chain,
    check_task_name,
    resolve_history,
    task_name_of,
)
from .layer import (
    HistoryLinear,
    active_in,
    adapters_in,
    add_history,
    bias_of,
    check_layers,
    collect_layers,
    freeze_history,
    low_rank,
    matrices_of,
    remove_adapter,
    untie,
)
from .low_rank import LowRank, merge_function, merge_needs_psi
from .penalties import PENALTIES, ModuleGroup, group_modules, layers_of_modules, total_penalty
from .starts import STARTS, needs_inputs

# PEFT's model classes for these tasks name the head in the config that they were given, after the tuner has copied it
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class ASOLoraModel(LoraModel):
    """A base model with one LoRA adapter a task; each task runs on top of its frozen history.

    Made by `get_peft_model(model, ASOLoraConfig(...))`, where it is `model.base_model`. Everything that
    `LoraModel` does works.

    Attributes:
        tasks (`TaskHistory`): which adapters are the history of which.
        attribution (`dict[str, torch.Tensor]`): adapter -> its stored attribution vector `(N,)`, the mean over its own
            task's probe. Saved with it.
        removed_tasks (`set[str]`): tasks that `remove_task` took out: saving and pushing may drop them.
    """

    active_adapter: str | list[str]
    # the history is on this object: inject_adapter_in_model, which returns the bare base model, is refused by PEFT
    uses_shared_state: bool = True

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.tasks = TaskHistory()
        self.attribution: dict[str, torch.Tensor] = {}
        self.removed_tasks: set[str] = set()
        self._loaded_hashes: dict[str, str] = {}  # of adapters as they were read from a file
        # adapters that are being added -> what trained before, to undo it after an error
        self._new: dict[str, list[nn.Parameter]] = {}  # by the user, until PEFT has settled their dtype
        self._without_weights: dict[str, list[nn.Parameter]] = {}  # from a file, until their weights are loaded
        self._adding_combined = False
        self._penalised: set[str] = set()  # tasks whose penalty was computed, or that were warned about

    # ---- adding and deleting adapters ------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter (PEFT calls this from `get_peft_model`, `add_adapter` and `load_adapter`).

        The model holds a copy of the config, with the task's name, the history and its hashes.

        Raises:
            ValueError: the name cannot be used, or the adapter cannot be part of the chain (`HistoryError`). The model
                is as before then.
        """
        config = self.peft_config[adapter_name]
        missing_heads = [h for h in _HEADS.get(config.task_type, ()) if h not in (config.modules_to_save or [])]
        reused = any(other is config for name, other in self.peft_config.items() if name != adapter_name)
        # with history=[] the model holds the object itself, as in PEFT
        if config.history != [] or reused or missing_heads or self._adding_combined:
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        config._adapter_name = adapter_name
        if missing_heads:
            config.modules_to_save = [*(config.modules_to_save or []), *missing_heads]
        if self._adding_combined:
            config.history, config.combined, config.task_name, config.peft_aso_version = [], True, None, None
        new = config.peft_aso_version is None
        if new and (config.history != [] or config.combined):
            config.soft_coefficients = config.similarities = config.attribution_layout = config.history_hashes = None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            check_adapter_name(adapter_name, model)
            resolve_history(adapter_name, self.peft_config)
            if new and not config.combined:
                check_task_name(task_name_of(adapter_name, config), model, self.peft_config)
            check_base_unchanged(adapter_name, self.peft_config)
            tasks = TaskHistory()
            tasks.refresh(self.peft_config)
            chains = {name: tasks.histories[name] for name in (adapter_name, *tasks.dependents(adapter_name))}
            for name, history in chains.items():
                check_chain(name, history, self.peft_config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for name, history in chains.items():
                check_layers(self.lora_layers(), name, history)
            self.sync_history()
            if new and config.history:
                holders = {task: adapter_of(task, self.peft_config, adapter_name) for task in config.history}
                config.history_hashes = {task: self.adapter_hash(str(name)) for task, name in holders.items()}
        except Exception:  # whatever PEFT raised: the model is as before, and the error goes on
            self.take_out(adapter_name, trained)
            raise
        (self._new if new else self._without_weights)[adapter_name] = trained
        if adapter_name in self.tasks.missing:
            warnings.warn(
                f"The adapter {adapter_name!r} was trained on top of {list(self.tasks.missing[adapter_name])}, which "
                "are not loaded yet. Load them before running it (peft_aso.load_chain loads a whole chain); until "
                "then its forward pass is an error.",
                stacklevel=3,
            )

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        module: nn.Module = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        if type(module) is lora.Linear:
            module.__class__ = HistoryLinear
        return module

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter that no other adapter is built on.

        If it is active, the last task of its history is active next.

        Raises:
            HistoryError: the adapter is in another adapter's history.
        """
        dependents = self.tasks.dependents(adapter_name)
        if dependents:
            raise HistoryError(
                f"{adapter_name!r} cannot be deleted: {', '.join(map(repr, dependents))} was trained on top of it. "
                "Delete those first (the newest first), or take the task out with peft_aso.remove_task."
            )
        previous = self.tasks.histories.get(adapter_name, ())[-1:]
        if list(self.active_adapters) == [adapter_name] and previous:
            _check_adapters_not_merged(self.model, adapter_name)
            warnings.warn(
                f"The active adapter {adapter_name!r} is deleted; {previous[0]!r} is active now.", stacklevel=2
            )
            self.set_adapter(previous[0])
        else:
            previous = ()
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)
        if previous:
            self.set_adapter(previous[0])  # it was frozen as the history of the deleted one

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `LoraModel.add_weighted_adapter`, on the named adapters' own weights (without their history).

        The new adapter is no task: its history is empty and it never becomes another task's history by default. With
        `lora_bias`, its bias is the weighted sum of theirs.

        Raises:
            ValueError: adapters with and without `lora_bias` are mixed.
        """
        if adapter_name in self.peft_config:
            return
        if len({bool(self.peft_config[name].lora_bias) for name in adapters if name in self.peft_config}) > 1:
            raise ValueError(
                f"{adapters} cannot be combined: some have lora_bias and some do not. Combine adapters of one kind."
            )
        self._adding_combined = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._adding_combined = False
        # the weights are combined for a scale of 1; a copied use_rslora would make that r / sqrt(r)
        self.peft_config[adapter_name].use_rslora = False
        for layer in self.lora_layers([adapter_name]).values():
            layer.scaling[adapter_name], layer.use_rslora[adapter_name] = 1.0, False
            biases = [(bias_of(layer, [name]), weight) for name, weight in zip(adapters, weights, strict=True)]
            terms = [bias * weight for bias, weight in biases if bias is not None]
            if terms:
                layer.lora_B[adapter_name].bias.data = torch.stack(terms).sum(0)

    def take_out(self, adapter_name: str, trained: Iterable[nn.Parameter]) -> None:
        """Remove an adapter whose adding or loading failed, and layers made for it; `trained` trains afterwards."""
        self.peft_config.pop(adapter_name, None)
        remove_adapter(self.model, adapter_name, [name for name in self.active_adapters if name != adapter_name])
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        """Drop what is stored about a deleted adapter."""
        self.attribution.pop(adapter_name, None)
        self._loaded_hashes.pop(adapter_name, None)
        self._without_weights.pop(adapter_name, None)
        self._new.pop(adapter_name, None)
        self._penalised.discard(adapter_name)
        self.sync_history()

    def sync_history(self) -> None:
        """After adapters were added or deleted: resolve names, attach the history to the layers, freeze it."""
        self.tasks.refresh(self.peft_config)
        for layer in self.lora_layers().values():
            if getattr(layer, "task_history", None) is None and not isinstance(layer, HistoryLinear):
                layer.register_forward_hook(add_history, with_kwargs=True)
            layer.task_history = self.tasks
            if "task_inputs" not in layer.other_param_names:
                layer.task_inputs, layer.other_param_names = {}, (*layer.other_param_names, "task_inputs")
        self._freeze_history()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's last step of adding and of loading an adapter: A starts here, in its final dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.tasks.generation += 1
        trained = self._new.pop(adapter_name, None)
        if trained is not None and self.peft_config[adapter_name].project_init:
            try:
                self._start_a(adapter_name)
            except ValueError:
                self.take_out(adapter_name, trained)
                raise
        self._freeze_history()  # the cast makes new parameters, some of which train

    @torch.no_grad()
    def _start_a(self, adapter_name: str) -> None:
        """Start A outside of the history's span; a start that needs the task's inputs follows in the training."""
        project = self.peft_config[adapter_name].project_init
        start = STARTS["random" if project is True or needs_inputs(project) else project]
        for layer in self.lora_layers([adapter_name]).values():
            A = matrices_of(layer, adapter_name)[0]
            if A.device.type != "meta":
                history = [low_rank(layer, old) for old in adapters_in(layer, self.tasks.histories[adapter_name])]
                A.copy_(start(A.flatten(1), history).view_as(A))

    # ---- what is active, what trains -------------------------------------------------------------------------------

    def lora_layers(self, names: Collection[str] | None = None) -> dict[str, LoraLayer]:
        """Module name (as in the base model) -> LoRA layer, in the model's order; with one of `names`, if given."""
        found: dict[str, LoraLayer] = {}
        collect_layers(self.model, "", found, set())
        return found if names is None else {name: each for name, each in found.items() if adapters_in(each, names)}

    def _wrappers(self) -> list[Any]:
        """The modules that have an active adapter: LoRA layers, copied heads, trained tokens."""
        found: dict[str, Any] = {}
        collect_layers(self.model, "", found, set(), (BaseTunerLayer, AuxiliaryTrainingWrapper))
        return list(found.values())

    def _freeze_history(self) -> None:
        frozen = self.tasks.frozen
        fixed = [name for name, config in self.peft_config.items() if not config.train_a]
        for module in self._wrappers():
            if isinstance(module, LoraLayer):
                freeze_history(module, frozen, fixed)
            elif frozen and isinstance(module, AuxiliaryTrainingWrapper):
                module.set_requires_grad(list(frozen), False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate a task on top of its history. Only the task trains, and only if nothing is built on it."""
        self.tasks.refresh(self.peft_config)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._freeze_history()
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._without_weights.pop(name, None)  # whoever activates an adapter uses it as it is
            if not inference_mode:
                self._loaded_hashes.pop(name, None)  # it may train
                self._expect_penalty(name)

    def _expect_penalty(self, task: str) -> None:
        """Warn once if an optimizer changes the task's weights and nothing has computed its penalty."""
        weight = matrices_of(next(iter(self.lora_layers([task]).values())), task)[1]
        start: list[torch.Tensor] = []

        def after_backward(weight: torch.Tensor) -> None:
            if task in self._penalised or not self.has_penalty(task):
                return
            if not start:
                start.append(weight.detach().clone())
            elif not torch.equal(start[0], weight):
                self._penalised.add(task)
                warnings.warn(
                    f"{task!r} is trained without the penalty of its config. Use ASOTrainer (for TRL ASOSFTTrainer), "
                    "add model.base_model.orthogonality_penalty() to the loss, or set penalty_weight=0.",
                    stacklevel=1,
                )

        if weight.requires_grad and task not in self._penalised:
            weight.register_post_accumulate_grad_hook(after_backward)

    def has_penalty(self, task: str) -> bool:
        """Whether a task has a penalty: most need a history."""
        config = self.peft_config[task]
        wanted = self.tasks.histories[task] or not PENALTIES[config.penalty].needs_history
        return bool(wanted) and config.resolved_penalty_weight > 0

    def uses_coefficients(self, task: str) -> bool:
        """Whether psi enters the training of a task or its merging."""
        config = self.peft_config[task]
        penalised = self.has_penalty(task) and PENALTIES[config.penalty].needs_history
        return bool(self.tasks.histories[task]) and (penalised or merge_needs_psi(config.merge))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's; the history stays frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_history()

    def enable_adapter_layers(self) -> None:
        """As PEFT's; the history stays frozen."""
        super().enable_adapter_layers()
        self._freeze_history()

    def refresh_history(self) -> None:
        """Compute anew what is cached of the history's weights, after a write into them by hand."""
        self.tasks.generation += 1

    def _apply(self, fn: Any, recurse: bool = True) -> ASOLoraModel:
        self.tasks.generation += 1  # .to(), .half(), .cuda()
        result: ASOLoraModel = super()._apply(fn, recurse)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.tasks.generation += 1
        super()._load_from_state_dict(*args, **kwargs)

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

    def task_name(self, adapter_name: str) -> str:
        """The task that an adapter holds, as saved in its config."""
        return task_name_of(adapter_name, self.peft_config[adapter_name])

    # ---- other models of the same weights --------------------------------------------------------------------------

    @contextmanager
    def only(self, adapter_name: str) -> Iterator[None]:
        """Inside the context the model is base + this adapter alone (Eq. 2).

        Active adapters are as before afterwards; `requires_grad` is not touched. Another thread that enters `only`,
        `through` or `folded` of the same model waits; one that runs the model without them sees the change.

        Raises:
            ValueError: no such adapter (the adapter's name, if the task's differs), or merged adapters.
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
        if self.is_merged:
            raise ValueError("The adapters are merged into the base weights. Call model.unmerge_adapter() first.")
        with self.tasks.lock, active_in(self._wrappers(), [adapter_name], adapter_name):
            active, was_alone = self.active_adapter, self.tasks.alone
            try:
                self.active_adapter, self.tasks.alone = adapter_name, alone
                yield
            finally:
                self.active_adapter, self.tasks.alone = active, was_alone

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside the context, and in evaluation mode, each linear layer runs as one product: base weight, history and
        active adapters in one matrix. For repeated evaluation.

        No gradient reaches the adapter's weights inside; gradients to activations are as ever. Layers for which one
        matrix is not the same sum in float32 (half precision, quantized weights, embeddings, DoRA) run as usual.
        `only` and `through` work inside and around. The matrices are freed at the end.
        """
        with self.tasks.lock:
            before, self.tasks.fold_active = self.tasks.fold_active, True
            try:
                yield
            finally:
                self.tasks.fold_active = before
                self.tasks.drop_cached(self.lora_layers().values())

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards the weights. Ask outside of a forward pass, in which they are gathered."""
        if may_shard() and not self.tasks.sharded:
            matrices = (matrices_of(layer, name)[0] for layer in self.lora_layers().values() for name in layer.r)
            self.tasks.sharded = any(is_sharded(matrix) for matrix in matrices)
        return self.tasks.sharded

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside the context each process has all weights, and parts of the model can be called one by one.

        All processes enter it together; it takes the memory of the model in each. Without FSDP2 nothing happens.
        """
        if not self.is_sharded:
            yield
            return
        self.tasks.sharded = False
        try:
            with gathered(self.model):
                yield
        finally:
            self.tasks.drop_cached(self.lora_layers().values())
            self.tasks.sharded = True

    # ---- penalty (Eq. 5-7) and soft coefficients (Eq. 6) -----------------------------------------------------------

    @property
    def soft_coefficients(self) -> dict[str, Any]:
        """psi of each earlier adapter for the current task (Eq. 6): `{"dbpedia": 0.37}`; 1.0 before the first update.

        With one psi a layer, each value is a list over the layers.
        """
        saved = self.peft_config[self.current_task].soft_coefficients or {}
        psi = {name: saved.get(self.task_name(name)) for name in self.history}
        return dict.fromkeys(psi, 1.0) if None in psi.values() else psi

    def set_soft_coefficients(self, psi: Mapping[str, Any], similarities: Mapping[str, Any] | None = None) -> None:
        """Set psi of the current task in its config.

        Args:
            psi: adapter or task name -> psi (a number, or one number a layer), for each task of the history.
            similarities: the w that psi came from, likewise.

        Raises:
            ValueError: a task of the history is missing in `psi`, an unknown one is in it, a value is not finite, or
                the numbers of values do not agree with each other or with the model's layers.
        """
        config = self.peft_config[self.current_task]
        named = {adapter_of(name, self.peft_config) or name: value for name, value in psi.items()}
        if set(named) != set(self.history):
            raise ValueError(
                f"psi is given for {sorted(named)}, and the history of {self.current_task!r} is {list(self.history)}. "
                "Give one value for each task of the history."
            )
        rows = {name: torch.as_tensor(named[name], dtype=torch.float64).detach().cpu() for name in self.history}
        same = len({row.shape for row in rows.values()}) <= 1 and all(row.dim() <= 1 for row in rows.values())
        if not same or not all(torch.isfinite(row).all() for row in rows.values()):
            raise ValueError(
                "psi must be finite: one number a task, or the same count of numbers (one a layer) for each task; got "
                f"{[row.tolist() for row in rows.values()]}."
            )
        if rows and next(iter(rows.values())).dim() == 1:
            self._layers(len(next(iter(rows.values()))))
        config.soft_coefficients = {self.task_name(name): row.tolist() for name, row in rows.items()}
        if similarities is not None:
            w = {adapter_of(name, self.peft_config) or name: value for name, value in similarities.items()}
            config.similarities = {self.task_name(name): w[name] for name in self.history if name in w}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def orthogonality_penalty(self) -> torch.Tensor:
        """Eq. 7 for the current task (or another registered penalty), without lambda, which is
        `peft_config[task].resolved_penalty_weight`.

        Returns:
            A float32 scalar with gradients to the task's A; 0 without history.

        Raises:
            MissingHistoryError: a task of the history is not loaded.
            HistoryError: an earlier task shares no module with the current one.
        """
        task = self.current_task
        self.tasks.require([task])
        self._penalised.add(task)
        layers = self.lora_layers([task])
        new = {}
        for name, layer in layers.items():
            A, B = matrices_of(layer, task)
            new[name] = LowRank(full_tensor(A).flatten(1), full_tensor(B).flatten(1), layer.scaling[task])
        device = next(iter(new.values())).A.device
        groups = []
        if self.history:
            groups = self.tasks.cached(self, task, lambda: self._group_history(layers, new))
        psi = torch.tensor(list(self.soft_coefficients.values()), device=device, dtype=torch.float32)
        by_layer = self._layers(psi.shape[1]) if psi.dim() == 2 else None
        return total_penalty(self.peft_config[task].penalty, groups, new, psi, by_layer)

    def _group_history(self, layers: Mapping[str, LoraLayer], new: Mapping[str, LowRank]) -> list[ModuleGroup]:
        self.check_shared_modules()
        sharded = self.is_sharded

        def factors(layer: LoraLayer, name: str) -> LowRank:
            update = low_rank(layer, name)
            inputs = None if update.inputs is None else update.inputs.to(update.A.device)
            A, B = (full_tensor(each) if sharded else each for each in (update.A, update.B))
            return LowRank(A, B, update.scale, inputs)

        order = {name: index for index, name in enumerate(self.history)}
        # tensors made in inference mode could not be used in training afterwards
        with torch.inference_mode(False), torch.no_grad():
            history = {
                name: [(order[old], factors(layer, old)) for old in adapters_in(layer, order)]
                for name, layer in layers.items()
            }
            return group_modules(new, history)

    def _layers(self, count: int) -> dict[str, int]:
        layout = self.peft_config[self.current_task].attribution_layout or []
        return layers_of_modules(list(self.lora_layers()), layout, count)

    def check_shared_modules(self) -> None:
        """Raise `HistoryError` if a task of the history shares no module with the current task."""
        task = self.current_task
        layers = self.lora_layers([task]).values()
        for old in self.history:
            if not any(adapters_in(layer, [old]) for layer in layers):
                raise HistoryError(
                    f"{old!r} and {task!r} have no module in common, so there is nothing to hold orthogonal. Give "
                    f"{task!r} a target module of {old!r}, leave {old!r} out of its history, or set penalty_weight=0."
                )

    def norm_penalty(self) -> torch.Tensor:
        """The sum of the norms of the current adapter's matrices: O-LoRA's second term, weighted by `l2_weight`."""
        task = self.current_task
        matrices = [matrix for layer in self.lora_layers([task]).values() for matrix in matrices_of(layer, task)]
        return torch.stack([torch.linalg.vector_norm(full_tensor(matrix).float()) for matrix in matrices]).sum()

    # ---- merging (Eq. 3) -------------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Whether any adapter is merged into the base weights."""
        return any(layer.merged for layer in self.lora_layers().values())

    @contextmanager
    def _history_active(self, adapter_names: list[str] | None) -> Iterator[list[str] | None]:
        """Let PEFT's merging, which takes the active adapters, see the tasks and their history.

        Yields:
            the `adapter_names` for PEFT: as given where no history is involved.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names={adapter_names!r}: give a list of names, [{adapter_names!r}].")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._check_names(names)
        self.tasks.require(names)
        self.tasks.generation += 1
        expanded = self.tasks.expand(names)
        layers = self.lora_layers(expanded)
        untie(self.model, layers.values())
        if expanded == names:  # layers may have other adapters active, and PEFT merges those
            yield adapter_names
            return
        others = [
            name
            for name, layer in layers.items()
            if not (isinstance(layer, HistoryLinear) and layer.can_merge_at_once(adapters_in(layer, expanded)))
        ]
        if others and self.peft_config[names[-1]].merge != "sum":
            raise ValueError(
                f"merge={self.peft_config[names[-1]].merge!r} merges linear layers only, and {others[0]} is none. Use "
                "peft_aso.export_merged."
            )
        heads = [name for name in expanded if name not in names and self.peft_config[name].modules_to_save]
        if heads:
            warnings.warn(
                f"modules_to_save of {heads} are left out of the merged model: task heads are not summed, the merged "
                f"model has the one of {names}.",
                stacklevel=4,
            )
        with active_in(self._wrappers(), expanded, names[-1] if adapter_names else None):
            yield None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge tasks with their history into the base weights (Eq. 3); `None`: the active task.

        Raises:
            ValueError: an unknown adapter.
            MissingHistoryError: a task of the history is not loaded.
        """
        with self._history_active(adapter_names) as names:
            super().merge_adapter(adapter_names=names, safe_merge=safe_merge)

    @contextmanager
    def merging_by(self, merge: str | Mapping[str, float] | None, adapter_names: Sequence[str]) -> Iterator[None]:
        """Inside the context the adapters are merged in this way; None: as the last one's config has it.

        Raises:
            ValueError: a name that is not registered, or an adapter without a weight.
        """
        config = self.peft_config[adapter_names[-1]]
        before = config.merge
        if merge is not None:
            merge_function(merge, adapter_names)
            config.merge = merge
        try:
            yield
        finally:
            config.merge = before

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None,
        merge: str | Mapping[str, float] | None = None,
    ) -> nn.Module:  # fmt: skip
        """As PEFT's, for tasks with their history (Eq. 3).

        Args:
            merge: how the tasks are merged: a registered name, or the weight of each task. None: as the last task's
                config has it, which is the sum by default.
        """
        given = adapter_names if isinstance(adapter_names, list) and adapter_names else None
        names = given or list(self.active_adapters)
        self._check_names(names)
        with self.merging_by(merge, self.tasks.expand(names)):
            return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out of the base weights again."""
        self.tasks.generation += 1
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:  # fmt: skip
        if not merge:
            return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        with self._history_active(adapter_names) as names:
            return super()._unload_and_optionally_merge(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=names
            )

    def _check_names(self, adapter_names: Sequence[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"There is no adapter {', '.join(map(repr, unknown))}. The model holds: "
                f"{', '.join(map(repr, self.peft_config)) or 'none'}."
            )

    # ---- saving and loading ----------------------------------------------------------------------------------------

    def adapter_hash(self, adapter_name: str) -> str:
        """SHA-256 of an adapter's LoRA tensors as float32 and of its scale, see `weights_hash`."""
        layers = self.lora_layers([adapter_name])
        tensors = {name: full_tensor(tensor) for name, tensor in tensors_of(layers, adapter_name).items()}
        return weights_hash(tensors, self.peft_config[adapter_name])

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        tuner = tuner_of(model)
        if tuner is None:
            return state_dict
        stored = stored_inputs(tuner.lora_layers([adapter_name]), adapter_name)
        if adapter_name in tuner.attribution:
            stored[ATTRIBUTION_KEY] = tuner.attribution[adapter_name].detach().cpu()
        return {**state_dict, **stored}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        stored = {key: state_dict.pop(key) for key in [*state_dict] if is_own_key(key)}
        vector = stored.get(ATTRIBUTION_KEY)
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = tuner_of(model)
        fresh = tuner is not None and adapter_name in tuner._without_weights
        try:
            for key, value in remapped.items():
                if isinstance(value, torch.Tensor) and not is_finite(value):
                    raise ValueError(
                        f"The weights of adapter {adapter_name!r} hold NaN or Inf ({key}). The file is damaged or the "
                        "training diverged; use an earlier checkpoint."
                    )
            shapes = {key: value.shape for key, value in model.state_dict().items()}
            if not config.history:  # other shapes are left to PEFT and its ignore_mismatched_sizes
                shapes.update({key: value.shape for key, value in remapped.items() if key in shapes})
            check_tensors(remapped, shapes, adapter_name, complete=fresh)
            if vector is not None and (fresh or config.attribution_layout):
                check_attribution(adapter_name, config.attribution_layout, vector)
            if tuner is not None:
                tensors = {key: value for key, value in state_dict.items() if ".lora_" in key}
                tuner._take_hash(adapter_name, weights_hash(tensors, tuner.peft_config[adapter_name]), check=fresh)
                store_inputs(tuner.lora_layers([adapter_name]), adapter_name, stored)
        except ValueError:
            if tuner is not None and fresh and len(tuner.peft_config) > 1:
                tuner.take_out(adapter_name, tuner._without_weights[adapter_name])
            raise
        if tuner is not None:
            tuner._take_attribution(adapter_name, vector)
        return remapped

    def _take_hash(self, adapter_name: str, found: str, check: bool = True) -> None:
        """Store the hash of an adapter that is being loaded, and compare it with those in the chain's configs.

        Raises:
            HistoryError: a task of the chain was trained on top of other weights, or another scale.
        """
        if check:
            for name in (adapter_name, *self.tasks.dependents(adapter_name)):
                expected = self.peft_config[name].history_hashes or {}
                for old in self.tasks.histories[name]:
                    if old in self._without_weights and old != adapter_name:
                        continue  # it is checked when its weights are loaded
                    here = found if old == adapter_name else self._loaded_hashes.get(old) or self.adapter_hash(old)
                    if expected.get(self.task_name(old), here) != here:
                        raise HistoryError(
                            f"{name!r} was trained on top of other weights of {self.task_name(old)!r} than those of "
                            f"the adapter {old!r} (SHA-256 {here[:12]}, expected "
                            f"{expected[self.task_name(old)][:12]}). Load the version that it was trained on."
                        )
        self._loaded_hashes[adapter_name] = found

    def _take_attribution(self, adapter_name: str, vector: torch.Tensor | None) -> None:
        """Take the attribution vector from an adapter's file, whose weights are about to be loaded."""
        self._without_weights.pop(adapter_name, None)
        self.attribution.pop(adapter_name, None)
        if vector is not None and self.peft_config[adapter_name].attribution_layout:
            self.attribution[adapter_name] = vector.detach().float().cpu()
        elif vector is not None:
            # the weights replace those of an adapter that is here already, and its config is not read again
            warnings.warn(
                f"The attribution vector in the file is ignored: the config of {adapter_name!r} in this model has no "
                "attribution_layout. Delete the adapter before loading it, to have both.",
                stacklevel=2,
            )


def tuner_of(model: nn.Module) -> ASOLoraModel | None:
    """The `ASOLoraModel` in a PEFT model, which may be wrapped by torch.compile or a data-parallel module."""
    if isinstance(model, ASOLoraModel):
        return model
    children = dict(model.named_children())
    inside = (children[name] for name in ("_orig_mod", "module", "base_model") if name in children)
    return next((tuner for tuner in map(tuner_of, inside) if tuner is not None), None)
