"""`ASOLoraModel`: PEFT's LoRA tuner with a history.

An adapter's name stands for "this task on top of its history" wherever PEFT takes a name: activating a task
activates its history in the forward pass, and merging it merges its history. The history is frozen, always:
an adapter that is in some other adapter's history never trains.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import _check_adapters_not_merged
from torch import nn

from .checks import check_base_unchanged, check_layers, check_weights
from .history import HistoryError, TaskHistory, check_adapter_name, check_chain, check_new_task, settle_history
from .layer import adapters_in, combine_biases, freeze_names, matrices_of, subspace_of
from .linear import attach_history, with_folding
from .orthogonality import project_out
from .penalty import PenalisedTask
from .persistence import ATTRIBUTION_KEY, check_attribution, tuner_of, with_attribution
from .removal import remove_adapter

# PEFT's classes for these tasks name the head in the config that they were given, once the tuner has made its copy
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class ASOLoraModel(PenalisedTask):
    """A base model with one LoRA adapter a task; each task runs on top of its frozen history.

    Made by `get_peft_model(model, ASOLoraConfig(...))`, where it is `model.base_model`. Everything that
    [`~peft.LoraModel`] does works; this class adds the history, the penalty of Eq. 7 and the coefficients of
    Eq. 6.

    Attributes:
        tasks (`TaskHistory`):
            Which adapters are the history of which.
        replaced (`dict[str, set[str]]`):
            Task -> SHA-256 of weights that `remove_task` or `update_task` took out: saving and pushing may drop them.
        attribution (`dict[str, torch.Tensor]`):
            Adapter -> its stored attribution vector `(N,)`, the mean over its own task's probe. Saved with
            it.
    """

    # PEFT hands the bare base model back from inject_adapter_in_model; the history lives on this object, so
    # that door must stay shut (PEFT raises an error that says so)
    uses_shared_state: bool = True

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.attribution: dict[str, torch.Tensor] = {}
        self.replaced: dict[str, set[str]] = {}
        self._adding_combined = False
        self._converting = False
        self._without_weights: set[str] = set()  # added from a saved config; the weights come next
        self._unprojected: set[str] = set()

    # ---- adapters come and go ----------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter (PEFT calls this from `get_peft_model`, `add_adapter` and `load_adapter`).

        The model holds a copy of the config, with the history and the task's name written into it.

        Raises:
            ValueError: the name cannot be used, or the adapter cannot be part of the chain (`HistoryError`).
                The model is as before then.
        """
        # a copy, because people use one config for several adapters
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        _name_heads(config)
        if self._adding_combined:
            config.history, config.combined, config.task_name = [], True, None
            config.soft_coefficients = config.similarities = config.attribution_layout = None
            config.peft_aso_version = None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            self._check_addition(adapter_name, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for task, history in self._chains_with(adapter_name):
                check_layers(self.lora_layers(), task, history)
            self._sync_history()
            if config.project_init and config.peft_aso_version is None:
                self._project_init(adapter_name)  # with "inputs" as well: A is outside of the span until they are seen
                self._unprojected.add(adapter_name)  # once more when its dtype is settled
        except Exception:  # whatever PEFT raised half-way: the model is as before, and the error goes on
            self._take_out(adapter_name, trained)
            raise
        if config.peft_aso_version is not None:
            self._without_weights.add(adapter_name)
        if adapter_name in self.tasks.missing:
            warnings.warn(
                f"The adapter {adapter_name!r} was trained on top of "
                f"{list(self.tasks.missing[adapter_name])}, which this model does not hold yet. Load them "
                "before running it (peft_aso.load_chain loads a whole chain); until then its forward pass is "
                "an error.",
                stacklevel=3,
            )

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        return with_folding(PenalisedTask._create_new_module(config, adapter_name, target, **kwargs))

    def _check_addition(self, adapter_name: str, model: nn.Module) -> None:
        """Everything that can be refused before the model is touched."""
        check_adapter_name(adapter_name, model)
        settle_history(adapter_name, self.peft_config)
        config = self.peft_config[adapter_name]
        if config.peft_aso_version is None and not config.combined:
            check_new_task(config.task_name, model, self.peft_config)
        if not self._converting:
            check_base_unchanged(adapter_name, self.peft_config)
        for task, history in self._chains_with(adapter_name):
            check_chain(task, history, self.peft_config)

    def _chains_with(self, adapter_name: str) -> list[tuple[str, tuple[str, ...]]]:
        """Each adapter that is this one or has it in its history, and its history as far as it is here."""
        tasks = TaskHistory()
        tasks.refresh(self.peft_config)
        names = [adapter_name, *tasks.dependents(adapter_name)]
        return [(name, tasks.histories[name]) for name in names]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter that no other adapter is built on. Of an active one, its predecessor is active
        next.

        Raises:
            HistoryError: the adapter is in another adapter's history.
        """
        dependents = self.tasks.dependents(adapter_name)
        if dependents:
            raise HistoryError(
                f"{adapter_name!r} cannot be deleted: {', '.join(map(repr, dependents))} was trained on top "
                "of it. Delete those first (the newest first)."
            )
        active = [name for name in self.active_adapters if name != adapter_name]
        remaining = [name for name in self.peft_config if name != adapter_name]
        succeeded = adapter_name in self.active_adapters and not active and bool(remaining)
        if succeeded:
            _check_adapters_not_merged(self.model, adapter_name)
            previous = [name for name in self.tasks.histories[adapter_name] if name in remaining]
            active = [(previous or remaining)[-1]]
            warnings.warn(
                f"The active adapter {adapter_name!r} is deleted; {active[0]!r} is active now.", stacklevel=2
            )
            self.set_adapter(active[0])  # left to themselves, layers with other adapters choose another one
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)
        if succeeded:
            self.set_adapter(active[0])  # it was frozen as the history of the deleted one

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `LoraModel.add_weighted_adapter`, on the named adapters' own weights (without their history).

        The new adapter is no task: its history is empty and it never becomes another task's history by
        itself. With `lora_bias`, its bias is the weighted sum of theirs.

        Raises:
            ValueError: adapters with and without `lora_bias` are mixed.
        """
        if adapter_name in self.peft_config:
            return
        biased = {bool(self.peft_config[name].lora_bias) for name in adapters if name in self.peft_config}
        if len(biased) > 1:
            raise ValueError(
                f"{adapters} cannot be combined: some have lora_bias and some do not. Combine those that "
                "have it, and those that do not, apart from each other."
            )
        self._adding_combined = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._adding_combined = False
        # the weights are combined for a scale of 1; a copied use_rslora would make that r / sqrt(r)
        self.peft_config[adapter_name].use_rslora = False
        for layer in self.lora_layers().values():
            if adapters_in(layer, [adapter_name]):
                layer.scaling[adapter_name] = 1.0
                layer.use_rslora[adapter_name] = False
                combine_biases(layer, adapters, weights, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate a task on top of its history. Only the task trains, and only if nothing is built on it."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        # whoever activates an adapter uses it as it is: a load that fails later must not take it out
        self._without_weights -= {adapter_name} if isinstance(adapter_name, str) else set(adapter_name)

    def _take_out(self, adapter_name: str, trained: list[torch.nn.Parameter]) -> None:
        """Remove an adapter whose adding or loading failed; `trained` trains afterwards, nothing else."""
        self.peft_config.pop(adapter_name, None)
        remove_adapter(self.model, adapter_name, list(self.active_adapters))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        """Drop what is kept about an adapter that is gone."""
        self.attribution.pop(adapter_name, None)
        self._coefficients.forget(adapter_name)
        self._without_weights.discard(adapter_name)
        self._unprojected.discard(adapter_name)
        self._sync_history()

    def _sync_history(self) -> None:
        """After adapters came or went: resolve names, tell the layers, freeze the history."""
        before = self.tasks.frozen
        self.tasks.refresh(self.peft_config)
        for layer in self.lora_layers().values():
            attach_history(layer, self.tasks)
            freeze_names(layer, self.tasks.frozen, before, self.tasks.fixed)
        self._groups.clear()
        self._freeze_history()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's last step of adding and of loading an adapter."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if adapter_name in self._unprojected:
            self._unprojected.discard(adapter_name)
            self._project_init(adapter_name)
        self._freeze_history()  # the cast makes new parameters, some of which train

    def _project_init(self, adapter_name: str) -> None:
        """Project A out of the span of the history's A."""
        for layer in self.lora_layers().values():
            history = adapters_in(layer, self.tasks.histories[adapter_name])
            if history and adapters_in(layer, [adapter_name]):
                rows = [subspace_of(layer, name) for name in history]
                matrix = matrices_of(layer, adapter_name)[0]
                if matrix.device.type != "meta":
                    with torch.no_grad():
                        matrix.copy_(project_out(matrix.flatten(1), rows).view_as(matrix))

    # ---- saving and loading: the attribution vector travels with the adapter ------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return with_attribution(state_dict, tuner_of(model), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        vector = state_dict.pop(ATTRIBUTION_KEY, None)
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = tuner_of(model)
        fresh = tuner is not None and adapter_name in tuner._without_weights
        try:
            check_weights(remapped, model, adapter_name, complete=fresh)
            if vector is not None and (fresh or config.attribution_layout):
                check_attribution(adapter_name, config.attribution_layout, vector)
        except ValueError:
            if tuner is not None and fresh and len(tuner.peft_config) > 1:
                trained = [parameter for parameter in tuner.model.parameters() if parameter.requires_grad]
                tuner._take_out(adapter_name, trained)
            raise
        if tuner is not None:
            tuner._take_weights(adapter_name, vector)
        return remapped

    def _take_weights(self, adapter_name: str, vector: torch.Tensor | None) -> None:
        """The adapter's weights are about to be loaded: take the file's attribution vector."""
        self._without_weights.discard(adapter_name)
        self.attribution.pop(adapter_name, None)
        if vector is None:
            return
        if not self.peft_config[adapter_name].attribution_layout:
            # the weights replace those of an adapter that is here already, and its config is not read again
            warnings.warn(
                f"The attribution vector in the file is left out: the config of {adapter_name!r} in this "
                "model does not say which neurons it belongs to. Delete the adapter before loading it, to "
                "have both.",
                stacklevel=2,
            )
            return
        self.attribution[adapter_name] = vector.detach().float().cpu()

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        # save_pretrained does this for adapters of the type LORA only
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        tuner = peft_model.base_model
        tuner._converting = True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* both hold the task")
                converted: dict[str, torch.Tensor] = super()._convert_state_dict_for_initial_model(
                    peft_model,
                    peft_config,
                    path_initial_model_for_weight_conversion,
                    output_state_dict,
                    kwargs,
                )
        finally:
            tuner._converting = False
        return converted


def _name_heads(config: Any) -> None:
    """Name the task's head among the modules that are trained and saved whole."""
    named = list(config.modules_to_save or [])
    missing = [head for head in _HEADS.get(config.task_type, ()) if head not in named]
    if missing:
        config.modules_to_save = named + missing


def weights_hash(weights: Mapping[str, torch.Tensor], config: Any = None) -> str:
    """SHA-256 of an adapter's values as float32, in the order of the tensors' names, and of its scale.

    The dtype in which they are kept is left out (PEFT changes it when it loads), and so is the attribution vector.

    Args:
        weights: file key -> tensor.
        config: the adapter's, whose scale is hashed too. None: the values alone (`chain.json` of format version 1).
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name == ATTRIBUTION_KEY:
            continue
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    if config is not None:
        scale = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}
        digest.update(json.dumps(scale, sort_keys=True).encode())
    return digest.hexdigest()
