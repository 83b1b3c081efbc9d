"""Tasks learned alone, each on the base model: the reference of forward transfer, and the bound. Run once and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from tasks import Task

from .evaluation import answer
from .methods import METHODS, Method
from .results import write_json
from .settings import Settings, digest
from .training import in_bf16, learn

Load = Callable[[], tuple[Any, Any]]


def alone_folder(settings: Settings) -> Path:
    """Where what these settings need is kept: runs that differ in nothing that matters share it."""
    return (settings.references or settings.out / "alone") / digest(settings.alone())


def learn_alone(tasks: list[Task], settings: Settings, load: Load) -> dict[str, dict[str, Any]]:
    """For each task what it comes to alone: `correct` by way of scoring, `log`, `seconds`; missing ones are run.

    Where another process is at a task, its result is waited for.
    """
    folder = alone_folder(settings)
    write_json(folder / "settings.json", settings.alone())
    method = None
    found = {}
    for number, task in enumerate(tasks, start=1):
        file = folder / f"{task.name}.json"
        with FileLock(folder / f".{task.name}.lock"):
            if not file.is_file():
                if method is None:
                    kind = "per_task_lora" if settings.alone()["scope"] == "lora" else "per_task_ft"
                    method = METHODS[kind](*load(), settings)
                print(f"\n=== {task.name} alone ({number} of {len(tasks)}) ===", flush=True)
                write_json(file, _one(method, task, settings))
        found[task.name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _one(method: Method, task: Task, settings: Settings) -> dict[str, Any]:
    started = time.time()
    log = learn(method, task, 0, settings)
    trained = time.time()
    with method.predict(task) as model:
        said = answer(model, method.tokenizer, task, settings.score, settings.max_tokens, in_bf16(settings))
    seconds = {"training": trained - started, "testing": time.time() - trained}
    return {"task": task.name, "correct": said.correct(task), "log": log, "seconds": seconds}
