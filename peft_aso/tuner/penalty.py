"""The current task's orthogonality penalty (Eq. 5-7) and its coefficients psi (Eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .active import ActiveTask
from .history import HistoryError, adapter_of, holder_of, task_name_of
from .kept import GLANCE, NotCopied, Watch, give_back
from .layer import adapters_in, matrices_of, subspace_of
from .orthogonality import FrozenGroup, group_history, norm_penalty, orthogonality_penalty
from .psi import CoefficientStore, layers_of_blocks
from .sharding_shim import Rows, whole


@dataclass
class _Prepared:
    """What the penalty of one task is computed from, as long as the chain and the history's weights stay the same.

    Attributes:
        task: the current task.
        histories: the resolved histories at the time; a new mapping takes their place whenever adapters come or go.
        layers: the LoRA layers that the task has weights in, by module name.
        places: shape and device of the task's A in each of them.
        watch: over the history's A in them.
        writes: of the model's history when all of them were looked at the last time.
        groups: the history's rows.
    """

    task: str
    histories: Mapping[str, tuple[str, ...]]
    layers: dict[str, LoraLayer]
    places: list[tuple[torch.Size, torch.device]]
    watch: Watch
    writes: int
    groups: list[FrozenGroup]


class _Holder(NotCopied):
    """Holds a `_Prepared`, or nothing. Copies and pickles of it hold nothing."""

    def __init__(self) -> None:
        self.held: _Prepared | None = None

    def clear(self) -> None:
        """Hold nothing."""
        self.held = None


class PenalisedTask(ActiveTask):
    """An active task that is held softly orthogonal to its history."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self._coefficients = CoefficientStore()
        self._groups = _Holder()

    @property
    def soft_coefficients(self) -> dict[str, Any]:
        """psi of each earlier task for the current one (Eq. 6): `{"dbpedia": 0.37}`; 1.0 before the first
        update.

        With one psi a layer, each value is a list over the layers.
        """
        self._recall_coefficients()
        return self._coefficients.as_dict(self.current_task, self.history)

    def set_soft_coefficients(
        self, psi: Mapping[str, Any], layer_of: Mapping[str, int] | None = None, similarities: Any = None
    ) -> None:
        """Set psi of the current task.

        Args:
            psi: adapter or task name -> psi (a number, or one number a layer), for each task of the history.
            layer_of: LoRA module name -> layer (column), when psi has one number a layer.
            similarities: the w that psi came from, by adapter or task name: kept in the adapter's config beside it, by
                task name.

        Raises:
            ValueError: a task of the history is missing in `psi`, an unknown one is in it, or a value is not
                finite.
        """
        config = self.peft_config[self.current_task]
        values = self._by_adapter(psi)
        self._coefficients.set(self.current_task, self.history, values, layer_of)
        config.soft_coefficients = {self.task_name(name): value for name, value in self.soft_coefficients.items()}
        if similarities is not None:
            named = self._by_adapter(similarities)
            config.similarities = {self.task_name(name): named[name] for name in self.history if name in named}

    def forget_soft_coefficients(self, adapter: str) -> None:
        """Take psi of an adapter from its config again, which was changed."""
        self._coefficients.forget(adapter)

    def _by_adapter(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {adapter_of(name, self.peft_config) or name: value for name, value in values.items()}

    def _recall_coefficients(self) -> None:
        """Take psi of a loaded task from its config, as far as it fits the chain."""
        task = self.current_task
        config = self.peft_config[task]
        saved = config.soft_coefficients
        if not saved or self._coefficients.knows(task):
            return
        psi = {str(holder_of(name, self.peft_config)): value for name, value in saved.items()}
        layout = config.attribution_layout or []
        numbers = all(isinstance(value, (int, float)) for value in psi.values())
        by_layer = all(isinstance(value, list) and len(value) == len(layout) > 0 for value in psi.values())
        if set(psi) == set(self.history) and (numbers or by_layer):
            names = [entry[0] for entry in layout]
            layer_of = layers_of_blocks(self.lora_layers(), names) if by_layer else None
            self._coefficients.set(task, self.history, psi, layer_of)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def orthogonality_penalty(self) -> torch.Tensor:
        """Eq. 7 for the current task (with `penalty="l1"` O-LoRA's sum of absolute values), without lambda, which is
        `peft_config[task].resolved_penalty_weight`: a float32 scalar with gradients to its A; 0 without history.

        Raises:
            MissingHistoryError: a task of the history is not loaded.
            HistoryError: an earlier task shares no module with the current one.
        """
        task = self.current_task
        self.tasks.require([task])
        self._recall_coefficients()
        if not self.history:
            return torch.zeros((), device=self._device_of(task))
        prepared, rows = self._prepared_for(task)
        current = rows.matrices
        psi, layer_of = self._coefficients.tensor(task, self.history, next(iter(current.values())).device)
        share = orthogonality_penalty(prepared.groups, current, psi, self.peft_config[task].penalty, layer_of)
        return rows.total(share)

    def gather_history(self) -> None:
        """Bring the history's A together in memory, as the first penalty does by itself.

        Whoever keeps something by where the history's weights lie calls this first: they lie still afterwards.
        """
        if self.history:
            self._prepared_for(self.current_task)

    def _device_of(self, task: str) -> torch.device:
        return subspace_of(next(iter(self.lora_layers([task]).values())), task).device

    def check_shared_modules(self) -> None:
        """Raise `HistoryError` if a task of the history shares no module with the current task."""
        layers = self.lora_layers().values()
        task = self.current_task
        for old in self.history:
            if not any(len(adapters_in(layer, [old, task])) == 2 for layer in layers):
                raise HistoryError(
                    f"{old!r} and {task!r} have no module in common, so there is nothing to hold orthogonal "
                    f"between them. Give {task!r} a target module of {old!r}, leave {old!r} out of its "
                    "history, or set penalty_weight=0."
                )

    def norm_penalty(self) -> torch.Tensor:
        """Sum of the norms of the current adapter's matrices: the term that `l2_weight` weighs."""
        layers = self.lora_layers([self.current_task]).values()
        return norm_penalty([whole(matrix) for layer in layers for matrix in matrices_of(layer, self.current_task)])

    def _prepared_for(self, task: str) -> tuple[_Prepared, Rows]:
        """The history's rows by shape and the task's own A. Prepared again only when something has changed."""
        held = self._groups.held
        same_chain = held is not None and held.task == task and held.histories is self.tasks.histories
        if held is not None and same_chain and self._unchanged(held):
            current = Rows({name: subspace_of(layer, task) for name, layer in held.layers.items()})
            if [(matrix.shape, matrix.device) for matrix in current.matrices.values()] == held.places:
                return held, current
        self._groups.clear()
        held = None  # the old copies are gone before there are new ones
        # tensors made in inference mode could not be used in training afterwards
        with torch.inference_mode(False), torch.no_grad():
            held = self._groups.held = self._prepare(task)
        return held, Rows({name: subspace_of(layer, task) for name, layer in held.layers.items()})

    def _prepare(self, task: str) -> _Prepared:
        self.check_shared_modules()
        self.note_sharding()
        layers = self.lora_layers([task])
        order = {name: index for index, name in enumerate(self.history)}
        present = {name: adapters_in(layer, order) for name, layer in layers.items()}
        rows = {
            name: [(order[old], self._frozen(subspace_of(layer, old))) for old in present[name]]
            for name, layer in layers.items()
        }
        current = Rows({name: subspace_of(layer, task) for name, layer in layers.items()}).matrices
        places = [(matrix.shape, matrix.device) for matrix in current.values()]
        self._clear_forms()  # they would be made anew afterwards, and keep the old places alive until then
        groups = group_history(rows, current, give_back=give_back)  # moves the rows: the watch comes after it
        give_back()
        watched = () if self.tasks.sharded else present.items()  # sharded weights come and go in each pass
        watch = _watch([(layers[name], names) for name, names in watched])
        return _Prepared(task, self.tasks.histories, layers, places, watch, self.tasks.writes, groups)

    def _frozen(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the history as the penalty keeps them: of sharded weights a copy, gathered once a task."""
        return whole(rows.detach()).clone() if self.tasks.sharded else rows

    def _unchanged(self, held: _Prepared) -> bool:
        writes = self.tasks.writes
        if self.tasks.sharded:
            return held.writes == writes
        hurried = self.training and held.writes == writes
        held.writes = writes
        return held.watch.unchanged(GLANCE * len(held.layers) if hurried else None)

    def task_name(self, adapter_name: str) -> str:
        """The task that an adapter holds, as saved in its config."""
        return task_name_of(adapter_name, self.peft_config[adapter_name])


def _watch(layers: Sequence[tuple[LoraLayer, Sequence[str]]]) -> Watch:
    """A watch over A of the named adapters in each layer, and over which adapters the layers have."""
    slots: list[tuple[Any, str]] = []
    tables: list[tuple[Any, str]] = []
    for layer, names in layers:
        tables += [(layer.lora_A.__dict__, "_modules"), (layer.lora_embedding_A.__dict__, "_keys")]
        for name in names:
            if name in layer.lora_embedding_A:
                slots.append((layer.lora_embedding_A._parameters, name))
            else:
                slots.append((layer.lora_A[name]._parameters, "weight"))
    return Watch(slots, tables)
