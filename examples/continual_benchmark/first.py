"""The first stage of a chain of adapters is the same whatever comes later: it is run once, and shared by runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock
from tasks import Task

from .methods import METHODS
from .results import RunFolder, read_json, write_json
from .settings import Settings, digest


def first_folder(settings: Settings, task: Task) -> Path | None:
    """Where the first stage of runs like this one is kept; None for a method that does not share it."""
    depends = METHODS[settings.method].first_stage(settings)
    if depends is None:
        return None
    return settings.out / "first" / digest({"task": task.name, **settings.alone(), **depends})


def take_first(settings: Settings, task: Task, folder: RunFolder) -> bool:
    """Give the run the first stage that another one has been through; False if there is none."""
    there = first_folder(settings, task)
    stage = None if there is None else read_json(there / "stage.json")
    if stage is None:
        return False
    folder.add_state(lambda new: shutil.copytree(there / "state", new, dirs_exist_ok=True) and None, stage)
    folder.add_stage(stage)
    return True


def keep_first(settings: Settings, task: Task, folder: RunFolder, stage: dict[str, Any]) -> None:
    """Keep the first stage of this run for others, unless a run beside this one has."""
    there = first_folder(settings, task)
    if there is None:
        return
    there.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(there.with_name(f".{there.name}.lock")):
        if (there / "stage.json").is_file():
            return
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(folder.state(0), there / "state")
        write_json(there / "stage.json", stage)  # last: it counts when the state is there
