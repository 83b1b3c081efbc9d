"""Which adapters are the history of which: names only, no tensors.

A task's history is a list of task names in its config. This file resolves those names to adapters, says which
are missing, and refuses what cannot be: a name that does not exist, a task that is its own ancestor.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn


class HistoryError(ValueError):
    """A history that cannot be: an unknown name, a cycle, an adapter that others are built on."""


class MissingHistoryError(RuntimeError):
    """A task is run without the tasks that it was trained on top of."""


class TaskHistory:
    """The resolved history of each adapter of one model. All tuner layers of the model share one instance.

    Attributes:
        histories (`dict[str, tuple[str, ...]]`):
            Adapter -> the loaded adapters of its history, oldest first.
        missing (`dict[str, tuple[str, ...]]`):
            Adapter -> the task names of its history that are not loaded. Adapters that lack nothing are not
            in it.
        frozen (`frozenset[str]`):
            Adapters that are in some adapter's history: they never train.
        fixed (`frozenset[str]`):
            Adapters whose A does not train.
        isolated (`frozenset[str]`):
            Adapters whose history is left out of the forward pass while they train.
        forms (`dict[str, str]`):
            Adapter -> the form in which its history is computed (`history_form` of its config).
        chains (`dict[str, str | None]`):
            Adapter -> the folder or the id on the Hub that has its history, where that is known.
        writes (`int`):
            How often weights were written in torch's own ways: loaded, moved, cast.
        alone (`bool`):
            True inside `ASOLoraModel.only`: adapters run without their history.
        as_one (`bool`):
            True inside `ASOLoraModel.as_one`: adapters run folded into the base weights, together with their history.
        sharded (`bool`):
            True where FSDP2 shards the weights: what a layer makes of them in a forward pass is not kept.
    """

    def __init__(self) -> None:
        self.histories: dict[str, tuple[str, ...]] = {}
        self.missing: dict[str, tuple[str, ...]] = {}
        self.frozen: frozenset[str] = frozenset()
        self.fixed: frozenset[str] = frozenset()
        self.isolated: frozenset[str] = frozenset()
        self.forms: dict[str, str] = {}
        self.chains: dict[str, str | None] = {}
        self.writes = 0
        self.alone = False
        self.as_one = False
        self.sharded = False
        self._resolved: dict[tuple[tuple[str, ...], bool, bool], tuple[str, ...]] = {}

    def refresh(self, configs: Mapping[str, Any]) -> None:
        """Resolve all names anew; called after an adapter came or went."""
        histories: dict[str, tuple[str, ...]] = {}
        self.missing = {}
        holders: dict[str, list[str]] = {}
        for adapter, config in configs.items():
            holders.setdefault(task_name_of(adapter, config), []).append(adapter)
        for adapter, config in configs.items():
            found = {
                task: next((name for name in holders.get(task, ()) if name != adapter), None)
                for task in config.history or []
            }
            histories[adapter] = tuple(name for name in found.values() if name is not None)
            lacking = tuple(task for task, name in found.items() if name is None)
            if lacking:
                self.missing[adapter] = lacking
        if histories != self.histories:  # else the same object: what was made from it still holds
            self.histories = histories
        self.frozen = frozenset(name for names in self.histories.values() for name in names)
        self.fixed = frozenset(name for name, config in configs.items() if not config.train_a)
        self.isolated = frozenset(name for name, config in configs.items() if config.forward_history == "isolated")
        self.forms = {name: config.history_form for name, config in configs.items()}
        self.chains = {name: config.chain for name, config in configs.items()}
        self._resolved = {}

    def dependents(self, adapter: str) -> list[str]:
        """The adapters that have `adapter` in their history."""
        return [name for name, history in self.histories.items() if adapter in history]

    def require(self, adapters: Iterable[str]) -> None:
        """Raise `MissingHistoryError` if one of the adapters lacks a part of its history."""
        for adapter in adapters:
            lacking = self.missing.get(adapter)
            if lacking and not self.alone:
                names = ", ".join(repr(task) for task in lacking)
                source = self.chains.get(adapter)
                chain = "" if source is None else f"(base, {source!r})"
                raise MissingHistoryError(
                    f"The adapter {adapter!r} was trained on top of tasks that are not loaded: {names}. Load "
                    "each with model.load_adapter(<its folder or Hub id>, adapter_name=<task>), or all at "
                    f"once with peft_aso.load_chain{chain}. To run the adapter by itself (Eq. 2), use "
                    f"`with model.base_model.only({adapter!r}):`."
                )

    def in_forward(self, active: tuple[str, ...], training: bool) -> tuple[str, ...]:
        """`resolve`, looked up: each layer asks in each forward pass."""
        key = (active, training, self.alone)
        names = self._resolved.get(key)
        if names is None:
            names = self._resolved[key] = self.resolve(active, training)
        return names

    def resolve(self, active: Sequence[str], training: bool) -> tuple[str, ...]:
        """The frozen adapters that take part in a forward pass next to the active ones, every name once.

        Raises:
            MissingHistoryError: a part of an active adapter's history is not loaded.
        """
        self.require(active)
        running = () if self.alone else [name for name in active if not (training and name in self.isolated)]
        found = dict.fromkeys(old for name in running for old in self.histories.get(name, ()))
        return tuple(old for old in found if old not in active)

    def expand(self, adapters: Iterable[str]) -> list[str]:
        """The adapters with the history of each before it, every name once; alone: just the adapters."""
        names: list[str] = []
        for adapter in adapters:
            history = () if self.alone else self.histories.get(adapter, ())
            names.extend(name for name in (*history, adapter) if name not in names)
        return names


def task_name_of(adapter: str, config: Any) -> str:
    """The task that an adapter holds: the name in its config, else the adapter's own."""
    return config.task_name or adapter


def holder_of(task: str, configs: Mapping[str, Any], exclude: str | None = None) -> str | None:
    """The adapter whose task has this name, or None; the oldest where there are several."""
    names = (name for name, config in configs.items() if task_name_of(name, config) == task)
    return next((name for name in names if name != exclude), None)


def adapter_of(task: str, configs: Mapping[str, Any], exclude: str | None = None) -> str | None:
    """The adapter that a user calls `task`: by its task's name, else by the adapter's own name; or None."""
    holder = holder_of(task, configs, exclude)
    return task if holder is None and task in configs and task != exclude else holder


def settle_history(adapter: str, configs: Mapping[str, Any]) -> None:
    """Fill in `task_name` and `history` of a newly added adapter's config, and check them.

    Args:
        adapter: the adapter that is being added; its config is in `configs` already.
        configs: the configs of all adapters of the model, in the order in which they were added.

    Raises:
        HistoryError: a name in the history does not exist (unless the config was read from a saved adapter,
            whose history may be loaded later); the history would form a cycle; the model has the task
            already; or the history is to be "all that the model holds", and one of those lacks its own.
    """
    config = configs[adapter]
    config.task_name = task_name_of(adapter, config)
    others = {name: other for name, other in configs.items() if name != adapter}
    saved = config.peft_aso_version is not None
    if not config.combined:
        _check_unique(adapter, config.task_name, others, saved)
    if config.history is None:
        config.history = _all_tasks(adapter, others)
    elif not saved:
        config.history = list(dict.fromkeys(_known_task(task, config, others) for task in config.history))
    _refuse_cycle(config.task_name, configs)


def _check_unique(adapter: str, task: str, others: Mapping[str, Any], saved: bool) -> None:
    """Refuse a second adapter for the same task; warn if it comes from a file (two checkpoints, say)."""
    holder = holder_of(task, others)
    if holder is None:
        return
    if saved:
        warnings.warn(
            f"The adapters {holder!r} and {adapter!r} both hold the task {task!r}. Tasks that were trained "
            f"on top of it run on {holder!r}.",
            stacklevel=2,
        )
        return
    raise HistoryError(
        f"The model holds the task {task!r} already, in the adapter {holder!r}. Give {adapter!r} another "
        "task_name, or leave task_name out: the adapter's name is used then."
    )


def _all_tasks(adapter: str, others: Mapping[str, Any]) -> list[str]:
    """The tasks that the model holds, in the order in which they came, but each after its own history."""
    tasks = {task_name_of(name, other): other for name, other in others.items() if not other.combined}
    for task, other in tasks.items():
        lacking = [name for name in other.history or [] if holder_of(name, others) is None]
        if lacking:
            raise HistoryError(
                f"{adapter!r} would be trained on top of {task!r}, which lacks its own history: "
                f"{', '.join(map(repr, lacking))}. Load those first, or say with history=[...] what "
                f"{adapter!r} is to be trained on top of."
            )
    return oldest_first({task: other.history or [] for task, other in tasks.items()})


def oldest_first(histories: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks, each after those of its history that are among them; of those that are ready the first given goes first.

    Tasks whose histories form a cycle, and what is built on them, are left out.
    """
    waiting = {task: set(history) & histories.keys() for task, history in histories.items()}
    placed: dict[str, None] = {}
    while ready := next((task for task, history in waiting.items() if placed.keys() >= history), None):
        del waiting[ready]
        placed[ready] = None
    return list(placed)


def _known_task(task: str, config: Any, others: Mapping[str, Any]) -> str:
    """The name of the task that the user calls `task`."""
    holder = adapter_of(task, others)
    if holder is not None:
        return task_name_of(holder, others[holder])
    if task == config.task_name:
        raise HistoryError(f"The task {task!r} is in its own history. Leave it out: history={config.history}.")
    held = ", ".join(repr(task_name_of(name, other)) for name, other in others.items()) or "no other task"
    raise HistoryError(
        f"history={config.history}: there is no task {task!r} in this model. It holds: {held}. Load it "
        "first, or leave it out of the history."
    )


def _refuse_cycle(task: str, configs: Mapping[str, Any]) -> None:
    """Raise if `task` is reachable from its own history."""
    parents = {task_name_of(name, config): list(config.history or []) for name, config in configs.items()}
    came_from: dict[str, str] = {}
    to_visit = [task]
    while to_visit:
        name = to_visit.pop()
        for parent in parents.get(name, []):
            if parent == task:
                path = [name]
                while path[-1] != task:
                    path.append(came_from[path[-1]])
                raise HistoryError(
                    f"The history of {task!r} leads back to itself: {' -> '.join([*reversed(path), task])} "
                    "(each was trained on top of the next). One of these adapters has a wrong `history` in "
                    "its adapter_config.json."
                )
            if parent not in came_from:
                came_from[parent] = name
                to_visit.append(parent)


# init_lora_weights values that change the base weights, which all tasks share
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# settings with which an adapter is not a sum W + (alpha/r) B A, or touches weights that all tasks share
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

# parts of PEFT's own parameter names; "__base__" stands for the base model in mixed batches
_PEFT_PARTS = {
    "__base__", "base_model", "model", "base_layer", "weight", "bias", "lora_A", "lora_B", "lora_embedding_A",
    "lora_embedding_B", "lora_dropout", "lora_magnitude_vector", "modules_to_save", "original_module",
    "token_adapter",
}  # fmt: skip


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse adapter names that PEFT would confuse with parts of the model's own parameter names.

    Raises:
        ValueError: the name is empty, has a dot, or equals a part of a module or parameter name.
    """
    if not is_free(name, name_parts(model)):
        raise ValueError(
            f"An adapter cannot be called {name!r}: the name is empty, has a dot or a slash, or is a part of "
            "the model's own parameter names, and PEFT finds an adapter's weights by its name. Choose "
            f"another name, such as {'task-' + name.replace('.', '-').replace('/', '-')!r}."
        )


def check_new_task(name: str, model: nn.Module, adapters: Container[str]) -> None:
    """Refuse a task's name that a saved chain could not have, before anything is trained under it.

    Args:
        adapters: names of the model's adapters, which are parts of its parameter names and no obstacle.

    Raises:
        ValueError: the name is no plain folder name, or a part of the model's own parameter names.
    """
    if not is_folder_name(name) or (name not in adapters and not is_free(name, name_parts(model))):
        raise ValueError(
            f"A task cannot be called {name!r}: a chain keeps each task in a folder of its name, and loads it under "
            "that name. Choose a plain one that is no part of the model's own parameter names."
        )


def name_parts(model: nn.Module) -> set[str]:
    """The parts of the model's own names and of PEFT's, which no adapter may be called."""
    parts = set(_PEFT_PARTS)
    for keys in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        parts.update(part for key, _ in keys if "lora_" not in key for part in key.split("."))
    return parts


def is_free(name: str, parts: Container[str]) -> bool:
    """Whether an adapter may have this name in a model with these `name_parts`."""
    return bool(name) and "." not in name and "/" not in name and name not in parts


def is_folder_name(name: object) -> bool:
    """Whether a task's name can be the name of its folder: a text that leads neither out of one nor out of sight."""
    return isinstance(name, str) and name[:1] not in ("", ".") and not set(name) & set("/\\\0")


def changes_base(config: Any) -> bool:
    """True if adding an adapter with this config changes the weights of the base model."""
    return str(config.init_lora_weights).lower().startswith(_CHANGES_BASE)


def chain_obstacles(config: Any) -> Iterator[str]:
    """Reasons why an adapter with this config can be neither history nor built on a history."""
    if changes_base(config):
        yield (
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which all tasks share "
            "(train it with another initialisation, or convert it with save_pretrained("
            "path_initial_model_for_weight_conversion=...))"
        )
    if config.bias != "none":
        yield f"bias={config.bias!r} trains the base model's biases, which all tasks share"
    for name, reason in _NOT_A_SUM.items():
        if getattr(config, name, None):
            yield f"{name}: {reason}"


def check_chain(adapter: str, history: tuple[str, ...], configs: Mapping[str, Any]) -> None:
    """Refuse a chain in which one adapter cannot be summed with the others.

    Raises:
        HistoryError: says which adapter and which of its settings.
    """
    if not history:
        return
    for name in (*history, adapter):
        for reason in chain_obstacles(configs[name]):
            raise HistoryError(
                f"The adapter {name!r} cannot be part of a chain of tasks: {reason}. Use it alone "
                "(history=[]), or leave the setting out."
            )
