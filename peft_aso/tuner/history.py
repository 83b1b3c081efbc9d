"""Which adapters are the history of which: names and configs only.

A task's history is a list of task names in its config. This module resolves those names to adapters, names the missing
ones, and refuses what cannot be: an unknown name, a task that is its own ancestor, adapters that cannot be summed.
"""

from __future__ import annotations

import graphlib
import threading
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

T = TypeVar("T")

# values of init_lora_weights that change the base weights, which all tasks share
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# settings with which an adapter is not a sum W + (alpha/r) B A, or changes weights that all tasks share
_NOT_A_SUM = {
    "use_dora": "DoRA rescales the base weight, so that adapters cannot be summed (Eq. 3)",
    "target_parameters": "adapters on bare parameters are merged into them during the forward pass",
    "trainable_token_indices": "trained embedding rows replace the base model's and cannot be summed",
    "layer_replication": "it changes the layers of the base model, which all tasks share",
    "arrow_config": "it routes between adapters",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it acts on a part of the tokens only",
    "velora_config": "it changes how the adapter is computed",
    "monteclora_config": "it samples the adapter's weights",
    "kasa_config": "it truncates the base weight",
}

# parts of PEFT's own parameter names; "__base__" is the base model in mixed batches
_PEFT_PARTS = {
    "__base__", "base_model", "model", "base_layer", "weight", "bias", "lora_A", "lora_B", "lora_embedding_A",
    "lora_embedding_B", "lora_dropout", "lora_magnitude_vector", "modules_to_save", "original_module",
    "token_adapter",
}  # fmt: skip


class HistoryError(ValueError):
    """A history that cannot be: an unknown name, a cycle, an adapter that others are built on."""


class MissingHistoryError(RuntimeError):
    """A task is run without the tasks that it was trained on top of."""


class TaskHistory:
    """The resolved history of each adapter of one model. All tuner layers of the model share one instance.

    Attributes:
        histories: adapter -> the loaded adapters of its history, oldest first.
        missing: adapter -> the task names of its history that are not loaded; adapters without any are left out.
        frozen: adapters that are in some adapter's history; they never train.
        configs: adapter -> its config.
        generation: rises with every call that changes adapters, their weights, devices or dtypes (an optimizer step
            changes the current task alone and does not count). What is computed from the frozen weights is valid for
            one generation.
        alone: True inside `ASOLoraModel.only`: adapters run without their history.
        fold_active: True inside `ASOLoraModel.folded`: active adapters are folded into the base weights as well.
        sharded: True if FSDP2 shards the weights: nothing that a layer computes from them is cached.
        lock: held inside `only`, `through` and `folded`, which change what every layer computes.
    """

    def __init__(self) -> None:
        self.histories: dict[str, tuple[str, ...]] = {}
        self.missing: dict[str, tuple[str, ...]] = {}
        self.frozen: frozenset[str] = frozenset()
        self.configs: Mapping[str, Any] = {}
        self.generation = 0
        self.alone = False
        self.fold_active = False
        self.sharded = False
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have an empty cache, and a lock of their own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()
        self.lock = threading.RLock()

    def refresh(self, configs: Mapping[str, Any]) -> None:
        """Resolve all names anew; called after an adapter was added or deleted."""
        self.generation += 1
        self.histories, self.missing, self.configs = {}, {}, configs
        holders: dict[str, list[str]] = {}
        for adapter, config in configs.items():
            holders.setdefault(task_name_of(adapter, config), []).append(adapter)
        for adapter, config in configs.items():
            found = {
                task: next((name for name in holders.get(task, ()) if name != adapter), None)
                for task in config.history or []
            }
            self.histories[adapter] = tuple(name for name in found.values() if name is not None)
            if missing := tuple(task for task, name in found.items() if name is None):
                self.missing[adapter] = missing
        self.frozen = frozenset(name for names in self.histories.values() for name in names)

    def dependents(self, adapter: str) -> list[str]:
        """The adapters that have `adapter` in their history."""
        return [name for name, history in self.histories.items() if adapter in history]

    def require(self, adapters: Iterable[str]) -> None:
        """Raise `MissingHistoryError` if a part of an adapter's history is not loaded."""
        for adapter in adapters:
            if adapter in self.missing and not self.alone:
                names = ", ".join(map(repr, self.missing[adapter]))
                raise MissingHistoryError(
                    f"The adapter {adapter!r} was trained on top of tasks that are not loaded: {names}. Load each "
                    "with model.load_adapter(<its folder or Hub id>, adapter_name=<task>), or all with "
                    f"peft_aso.load_chain. To run the adapter alone (Eq. 2), use `with "
                    f"model.base_model.only({adapter!r}):`."
                )

    def in_forward(self, active: Sequence[str], training: bool) -> tuple[str, ...]:
        """The frozen adapters that take part in a forward pass together with the active ones, each once.

        Raises:
            MissingHistoryError: a part of an active adapter's history is not loaded.
        """
        self.require(active)
        if self.alone:
            return ()
        running = [name for name in active if not (training and self.configs[name].forward_history == "isolated")]
        found = dict.fromkeys(old for name in running for old in self.histories.get(name, ()))
        return tuple(old for old in found if old not in active)

    def expand(self, adapters: Iterable[str]) -> list[str]:
        """The adapters, each after its history, every name once; inside `only` the adapters themselves."""
        histories = {} if self.alone else self.histories
        return list(dict.fromkeys(name for each in adapters for name in (*histories.get(each, ()), each)))

    def cached(self, owner: Any, key: Any, make: Callable[[], T]) -> T:
        """The value that was made for `owner` and `key` in this generation, or a new one; one is cached an owner."""
        held = self._cache.get(owner)
        if held is None or held[0] != (self.generation, key):
            self._cache.pop(owner, None)  # the old value is freed before the new one is made
            held = self._cache[owner] = ((self.generation, key), make())
        value: T = held[1]
        return value

    def drop_cached(self, owners: Iterable[Any]) -> None:
        """Free what is cached for these owners."""
        for owner in owners:
            self._cache.pop(owner, None)


# ---- tasks and adapters --------------------------------------------------------------------------------------------


def task_name_of(adapter: str, config: Any) -> str:
    """The task that an adapter holds: the name in its config, else the adapter's own."""
    return config.task_name or adapter


def adapter_of(task: str, configs: Mapping[str, Any], exclude: str | None = None) -> str | None:
    """The adapter that holds `task`: by its task's name (the oldest one), else by the adapter's own name; or None."""
    names = (name for name, config in configs.items() if task_name_of(name, config) == task and name != exclude)
    own_name = task if task in configs and task != exclude else None
    return next(names, own_name)


def psi_matrix(adapters: Sequence[str], configs: Mapping[str, Any]) -> torch.Tensor:
    """`(T, T)`, float64: row t, column s has the saved psi of adapter t to the earlier s (mean of layers), else 1."""
    psi = torch.ones(len(adapters), len(adapters), dtype=torch.float64)
    for t, adapter in enumerate(adapters):
        saved = configs[adapter].soft_coefficients or {}
        for s, earlier in enumerate(adapters[:t]):
            value = saved.get(task_name_of(earlier, configs[earlier]))
            psi[t, s] = psi[t, s] if value is None else torch.tensor(value, dtype=torch.float64).mean()
    return psi


def oldest_first(histories: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks, each after those of its history that are among them; of those that can be next the first given is.

    A task that is its own ancestor is a `HistoryError`.
    """
    place = {task: index for index, task in enumerate(histories)}
    graph = {task: [old for old in history if old in histories] for task, history in histories.items()}
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        path = " -> ".join(reversed(error.args[1]))
        raise HistoryError(
            f"The histories form a cycle: {path} (each was trained on top of the next). One of these adapters has a "
            "wrong `history` in its adapter_config.json."
        ) from error
    ordered: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
        ordered.append(ready.pop(0))
        sorter.done(ordered[-1])
    return ordered


def resolve_history(adapter: str, configs: Mapping[str, Any]) -> None:
    """Fill in `task_name` and `history` of the config of an adapter that is being added, and check them.

    Raises:
        HistoryError: an unknown name in the history (of a saved adapter the history may be loaded later); a cycle; a
            second adapter for one task; or `history=None` with an adapter that lacks its own history.
    """
    config = configs[adapter]
    task = task_name_of(adapter, config)
    if config.history != []:
        config.task_name = task
    others = {name: other for name, other in configs.items() if name != adapter}
    saved = config.peft_aso_version is not None
    holder = next((name for name, other in others.items() if task_name_of(name, other) == task), None)
    if holder is not None and not config.combined:
        if not saved:
            raise HistoryError(
                f"The adapter {holder!r} holds the task {task!r} already. Give {adapter!r} another name."
            )
        both = f"The adapters {holder!r} and {adapter!r} both hold the task {task!r}."
        warnings.warn(f"{both} Tasks that were trained on top of it run on {holder!r}.", stacklevel=2)
    if config.history is None:
        tasks = {task_name_of(name, other): other for name, other in others.items() if not other.combined}
        for earlier, other in tasks.items():
            if missing := [name for name in other.history or [] if adapter_of(name, others) is None]:
                raise HistoryError(
                    f"{adapter!r} would be trained on top of {earlier!r}, whose history is not loaded: "
                    f"{', '.join(map(repr, missing))}. Load it first, or name the history with history=[...]."
                )
        config.history = oldest_first({task: other.history or [] for task, other in tasks.items()})
    elif not saved:
        config.history = list(dict.fromkeys(_known_task(task, config, others) for task in config.history))
    oldest_first({task_name_of(name, each): each.history or [] for name, each in configs.items()})  # refuses cycles


def _known_task(task: str, config: Any, others: Mapping[str, Any]) -> str:
    """The name of the task that the user calls `task`."""
    holder = adapter_of(task, others)
    if holder is not None:
        return task_name_of(holder, others[holder])
    if task == config.task_name:
        raise HistoryError(f"The task {task!r} is in its own history. Leave it out: history={config.history}.")
    tasks = ", ".join(repr(task_name_of(name, other)) for name, other in others.items()) or "none"
    raise HistoryError(
        f"history={config.history}: the model has no task {task!r} (its tasks: {tasks}). Load it first, or leave it "
        "out of the history."
    )


# ---- names ---------------------------------------------------------------------------------------------------------


def name_parts(model: nn.Module) -> set[str]:
    """The parts of the model's own parameter names and of PEFT's, which no adapter may be called."""
    parts = set(_PEFT_PARTS)
    for keys in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        parts.update(part for key, _ in keys if "lora_" not in key for part in key.split("."))
    return parts


def is_free(name: str, parts: Container[str]) -> bool:
    """Whether an adapter may have this name in a model with these `name_parts`."""
    return bool(name) and "." not in name and "/" not in name and name not in parts


def is_folder_name(name: object) -> bool:
    """Whether a task's name can be the name of its folder: a plain, visible one."""
    return isinstance(name, str) and name[:1] not in ("", ".") and not set(name) & set("/\\\0")


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Raise ValueError for names that PEFT would confuse with parts of the model's own parameter names."""
    if not is_free(name, name_parts(model)):
        raise ValueError(
            f"An adapter cannot be called {name!r}: the name is empty, has a dot or a slash, or is a part of the "
            "model's own parameter names, by which PEFT finds an adapter's weights. Choose another name, such as "
            f"{'task-' + name.replace('.', '-').replace('/', '-')!r}."
        )


def check_task_name(name: str, model: nn.Module, adapters: Container[str]) -> None:
    """Raise ValueError for the name of a new task that a saved chain could not have; names of `adapters` are free."""
    if not is_folder_name(name) or (name not in adapters and not is_free(name, name_parts(model))):
        raise ValueError(
            f"A task cannot be called {name!r}: a chain has a folder and an adapter of that name. Choose letters, "
            "digits, '-' and '_', and no part of the model's own parameter names."
        )


# ---- what can be summed --------------------------------------------------------------------------------------------


def changes_base(config: Any) -> bool:
    """Whether adding an adapter with this config changes the weights of the base model."""
    return str(config.init_lora_weights).lower().startswith(_CHANGES_BASE)


def chain_obstacles(config: Any) -> Iterator[str]:
    """Reasons why an adapter with this config can be neither history nor built on a history."""
    if changes_base(config):
        yield (
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which all tasks share (train "
            "with another initialisation, or convert a stock LoRA adapter with PEFT's "
            "path_initial_model_for_weight_conversion and take it in with load_history)"
        )
    if config.bias != "none":
        yield f"bias={config.bias!r} trains the base model's biases, which all tasks share"
    for name, reason in _NOT_A_SUM.items():
        if getattr(config, name, None):
            yield f"{name}: {reason}"


def check_chain(adapter: str, history: Sequence[str], configs: Mapping[str, Any]) -> None:
    """Raise `HistoryError` if one adapter of a chain cannot be summed with the others."""
    for name in (*history, adapter) if history else ():
        for reason in chain_obstacles(configs[name]):
            raise HistoryError(
                f"The adapter {name!r} cannot be part of a chain of tasks: {reason}. Use it alone (history=[]), or "
                "leave the setting out."
            )


def check_base_unchanged(adapter: str, configs: Mapping[str, Any]) -> None:
    """Raise `HistoryError` for an initialisation that changes the base weights under other adapters of the model."""
    for name, config in configs.items():
        if changes_base(config) and len(configs) > 1:
            raise HistoryError(
                f"{adapter!r} cannot be added: init_lora_weights={config.init_lora_weights!r} of {name!r} changes the "
                "base weights, which all adapters share. Use such an adapter alone, or another initialisation."
            )
