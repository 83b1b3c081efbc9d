"""In which order the tasks of a chain were learned, from each one's history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tuner.history import oldest_first
from .errors import ChainError
from .reading import AdapterFile


def in_order(adapters: Sequence[AdapterFile], tasks: Sequence[str] | None = None) -> list[AdapterFile]:
    """The adapters, oldest first: each after all tasks of its history.

    Args:
        adapters: in the order that decides between tasks that do not build on each other.
        tasks: only these and their histories; None: all.

    Raises:
        ChainError: two adapters hold the same task, a task is not there, a history is not there, or the
            histories form a cycle.
    """
    by_name = _by_name(adapters)
    if tasks is not None:
        wanted = [tasks] if isinstance(tasks, str) else list(tasks)
        for task in wanted:
            if task not in by_name:
                raise ChainError(f"There is no task {task!r} here. There are: {', '.join(map(repr, by_name))}.")
        if not wanted:
            raise ChainError(f"tasks is an empty list. Name some of {', '.join(map(repr, by_name))}, or leave it out.")
        by_name = {name: adapter for name, adapter in by_name.items() if name in _ancestry(wanted, by_name)}
    for adapter in by_name.values():
        lacking = [task for task in adapter.history if task not in by_name]
        if lacking:
            names = ", ".join(map(repr, lacking))
            raise ChainError(
                f"{adapter.name!r} was trained on top of {names}, which "
                f"{'is' if len(lacking) == 1 else 'are'} not here. Put the missing adapter folders beside "
                f"{adapter.path}, or pass a list of all adapter folders of the chain, oldest first."
            )
    return _sorted(by_name)


def with_history(manifest: Mapping[str, Mapping[str, Any]], tasks: Sequence[str] | None) -> list[str]:
    """Tasks of a manifest and what they were trained on top of, in the manifest's order; None: all.

    Raises:
        ChainError: a task that the manifest has not.
    """
    if tasks is None:
        return list(manifest)
    open_tasks, found = [tasks] if isinstance(tasks, str) else list(tasks), set[str]()
    while open_tasks:
        task = open_tasks.pop()
        if task not in manifest:
            raise ChainError(f"There is no task {task!r} here. There are: {', '.join(map(repr, manifest))}.")
        if task not in found:
            found.add(task)
            open_tasks.extend(manifest[task]["history"])
    return [task for task in manifest if task in found]


def _by_name(adapters: Sequence[AdapterFile]) -> dict[str, AdapterFile]:
    by_name: dict[str, AdapterFile] = {}
    for adapter in adapters:
        if adapter.name in by_name:
            raise ChainError(
                f"Two folders hold a task called {adapter.name!r}: {by_name[adapter.name].path} and "
                f"{adapter.path}. Remove one of them, or pass a list of the folders that you mean."
            )
        by_name[adapter.name] = adapter
    return by_name


def _ancestry(wanted: Sequence[str], by_name: dict[str, AdapterFile]) -> set[str]:
    """The wanted tasks and everything that they are built on."""
    found: set[str] = set()
    open_tasks = list(wanted)
    while open_tasks:
        task = open_tasks.pop()
        if task not in found and task in by_name:
            found.add(task)
            open_tasks.extend(by_name[task].history)
    return found


def _sorted(by_name: dict[str, AdapterFile]) -> list[AdapterFile]:
    """Topological order; among those that are ready, the first given goes first."""
    ordered = oldest_first({name: adapter.history for name, adapter in by_name.items()})
    waiting = {name: adapter for name, adapter in by_name.items() if name not in ordered}
    if waiting:
        raise ChainError(
            f"The histories form a cycle: {_cycle(waiting)} (each was trained on top of the next). One "
            "of these adapters has a wrong `history` in its adapter_config.json."
        )
    return [by_name[name] for name in ordered]


def _cycle(waiting: dict[str, AdapterFile]) -> str:
    """One cycle among tasks of which each has a history that is among them."""
    path = [next(iter(waiting))]
    while True:
        following = next(task for task in waiting[path[-1]].history if task in waiting)
        if following in path:
            return " -> ".join([*path[path.index(following) :], following])
        path.append(following)
