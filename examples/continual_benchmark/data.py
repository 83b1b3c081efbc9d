"""The tasks of a run: from a folder of task folders, or from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tasks import Task, read_task

from .settings import Settings


def read_tasks(names: Sequence[str], settings: Settings) -> list[Task]:
    """The tasks in order, limited as the settings say.

    Raises:
        SystemExit: a task that is not there, a file that is not in the format, or no example left to test on.
    """
    if settings.data == "hub":
        from .hub import hub_task

        found = [hub_task(name, settings.full) for name in names]
    else:
        root = Path(settings.data)
        missing = [name for name in names if not (root / name / "labels.json").is_file()]
        if missing:
            raise SystemExit(
                f"--data {root}: no task {', '.join(missing)} there. Give the folder that holds one folder a task "
                "(its format: examples/data/README.md), or --data hub."
            )
        found = [read_task(root / name, full=settings.full) for name in names]
    return [_limited(_validation(task) if settings.validation else task, settings) for task in found]


def _validation(task: Task) -> Task:
    """Train on the first four fifths of the training examples, test on the last."""
    cut = len(task.train) - len(task.train) // 5
    return replace(task, train=task.train[:cut], test=task.train[cut:])


def _limited(task: Task, settings: Settings) -> Task:
    found = replace(task, train=task.train[: settings.train_limit], test=task.test[: settings.test_limit])
    if not found.train or not found.test:
        raise SystemExit(f"{task.name}: {len(found.train)} examples to train on and {len(found.test)} to test on.")
    return found
