"""The current task's orthogonality penalty (Eq. 5-7) and its coefficients psi (Eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .active import ActiveTask
from .history import HistoryError, adapter_of, holder_of, task_name_of
from .kept import Kept
from .layer import adapters_in, fingerprint, matrices_of, subspace_of
from .orthogonality import FrozenGroup, group_history, norm_penalty, orthogonality_penalty
from .psi import CoefficientStore


class PenalisedTask(ActiveTask):
    """An active task that is held softly orthogonal to its history."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self._coefficients = CoefficientStore()
        self._groups: Kept[list[FrozenGroup]] = Kept()

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
            similarities: the w that psi came from, kept in the adapter's config beside it.

        Raises:
            ValueError: a task of the history is missing in `psi`, an unknown one is in it, or a value is not
                finite.
        """
        config = self.peft_config[self.current_task]
        values = {adapter_of(name, self.peft_config) or name: value for name, value in psi.items()}
        self._coefficients.set(self.current_task, self.history, values, layer_of)
        config.soft_coefficients = {self.task_name(name): value for name, value in self.soft_coefficients.items()}
        if similarities is not None:
            config.similarities = dict(similarities)

    def _recall_coefficients(self) -> None:
        """Take psi of a loaded task from its config. (One psi a layer needs `layer_of`: not recalled.)"""
        task = self.current_task
        saved = self.peft_config[task].soft_coefficients or {}
        psi = {holder_of(name, self.peft_config): value for name, value in saved.items()}
        numbers = all(isinstance(value, (int, float)) for value in psi.values())
        if not self._coefficients.knows(task) and numbers and set(psi) == set(self.history):
            self._coefficients.set(task, self.history, {str(name): value for name, value in psi.items()})

    @torch.compiler.disable
    def orthogonality_penalty(self) -> torch.Tensor:
        """Eq. 7 without lambda for the current task: a float32 scalar with gradients to its A; 0 without
        history.

        Raises:
            MissingHistoryError: a task of the history is not loaded.
            HistoryError: an earlier task shares no module with the current one.
        """
        task = self.current_task
        self.tasks.require([task])
        layers = {name: layer for name, layer in self.lora_layers().items() if adapters_in(layer, [task])}
        current = {name: subspace_of(layer, task) for name, layer in layers.items()}
        self._recall_coefficients()
        psi, layer_of = self._coefficients.tensor(task, self.history, next(iter(current.values())).device)
        if not self.history:
            return torch.zeros((), device=psi.device)
        form = self.peft_config[task].penalty
        return orthogonality_penalty(self._history_groups(layers, current), current, psi, form, layer_of)

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
        layers = [layer for layer in self.lora_layers().values() if adapters_in(layer, [self.current_task])]
        return norm_penalty([matrix for layer in layers for matrix in matrices_of(layer, self.current_task)])

    def _history_groups(
        self, layers: Mapping[str, LoraLayer], current: Mapping[str, torch.Tensor]
    ) -> list[FrozenGroup]:
        """The history's rows by shape, stacked again only when an adapter of the history has changed."""
        order = {name: index for index, name in enumerate(self.history)}
        present = {name: adapters_in(layer, order) for name, layer in layers.items()}
        places = tuple((matrix.shape, matrix.device) for matrix in current.values())
        key = (
            self.history,
            places,
            *((name, fingerprint(layer, present[name])) for name, layer in layers.items()),
        )

        def make() -> list[FrozenGroup]:
            self.check_shared_modules()
            rows = {
                name: [(order[old], subspace_of(layer, old)) for old in present[name]]
                for name, layer in layers.items()
            }
            return group_history(rows, current)

        return self._groups.get(key, make)

    def task_name(self, adapter_name: str) -> str:
        """The task that an adapter holds, as saved in its config."""
        return task_name_of(adapter_name, self.peft_config[adapter_name])
