"""A run: an order of tasks learned one after another, all tested after each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tasks import Task, best_device, bf16_is_faster, load_model
from transformers import GenerationConfig, set_seed

from .data import order_of, read_tasks, short
from .evaluation import answered_right
from .methods import METHODS, Method
from .records import RESULTS, Record
from .settings import Settings, folder_of
from .training import learn, seed_of

# what a model trained on one task alone does not depend on
_NOT_ALONE = {"method", "order", "tested", "micro_batch"}


def run(settings: Settings) -> Record:
    """Run, or go on with a run that was stopped, after its last finished stage; the record, which is on disk too.

    Raises:
        SystemExit: tasks that are not there, more than one GPU, or a folder that holds a run of other settings.
    """
    if torch.cuda.device_count() > 1:
        raise SystemExit("A run has one GPU to itself: choose it with CUDA_VISIBLE_DEVICES=0.")
    tasks = read_tasks(order_of(settings.order), settings)
    folder = folder_of(settings, short([task.name for task in tasks]))
    record = json.loads((folder / RESULTS).read_text()) if (folder / RESULTS).is_file() else None
    if settings.precision == "auto":
        began = record["settings"]["precision"] if record else "bf16" if bf16_is_faster() else "float32"
        settings = replace(settings, precision=began)
    kind, chosen = METHODS[settings.method], settings.recorded()
    if record is None:
        names = [task.name for task in tasks]
        record = {"title": kind.title, "tasks": names, "settings": chosen, "stages": [], "alone": None}
    other = [name for name in {**record["settings"], **chosen} if record["settings"].get(name) != chosen.get(name)]
    if other:
        raise SystemExit(f"{folder} holds a run with another {', '.join(other)}: give this run another --name.")
    if kind.alone:
        record["alone"] = _learn_alone(tasks, settings)
        seen = [tasks[: index + 1] for index in range(len(tasks))]  # nothing is forgotten
        record["stages"] = [
            {"task": each[-1].name, "correct": {task.name: record["alone"][task.name] for task in each}}
            for each in seen
        ]
    else:
        _learn_chain(tasks, settings, folder, record)
        if record["alone"] is None and not settings.no_reference:
            record["alone"] = _learn_alone(tasks, settings)
    write(folder / RESULTS, record)
    return record


def _learn_chain(tasks: list[Task], settings: Settings, folder: Path, record: Record) -> None:
    """Learn the tasks that the record has no stage of; the record and the state are written after each."""
    done = len(record["stages"])
    if done == len(tasks):
        return
    method = start_method(METHODS[settings.method], tasks[0], settings)
    if done:
        print(f"Going on after {tasks[done - 1].name}, which {folder} has.")
        method.restore(folder / f"state_{done}", tasks[:done])
    for index, task in enumerate(tasks[done:], start=done):
        print(f"\n=== {method.title}, stage {index + 1} of {len(tasks)}: {task.name} ===", flush=True)
        started = time.time()
        stage = {"task": task.name, "log": learn(method, task, index, settings), **method.facts(task)}
        trained = time.time()
        state = folder / f"state_{index + 1}"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        method.save(state)
        tested = [task] if settings.tested == "new" and index < len(tasks) - 1 else tasks[: index + 1]
        stage["correct"] = {each.name: _test(method, each, settings) for each in tested}
        stage["seconds"] = {"training": round(trained - started), "testing": round(time.time() - trained)}
        record["stages"].append(stage)
        write(folder / RESULTS, record)
        shutil.rmtree(folder / f"state_{index}", ignore_errors=True)
        shares = {name: "/".join(f"{100 * b.count('1') / len(b):.0f}" for b in ways.values())
                  for name, ways in stage["correct"].items()}  # fmt: skip
        print(", ".join(f"{name} {share}%" for name, share in shares.items()), flush=True)


def _learn_alone(tasks: list[Task], settings: Settings) -> dict[str, dict[str, str]]:
    """How each task is answered that is learned alone on the base model: the reference of FWT, and the bound.

    Runs with the same training share them, in `OUT/alone`.
    """
    full = METHODS[settings.method].trains_all(settings)
    kind = METHODS["per_task_ft" if full else "per_task_lora"]
    of_alone = replace(settings, method="per_task_ft" if full else "per_task_lora").recorded()
    depends = {name: value for name, value in of_alone.items() if name not in _NOT_ALONE}
    key = hashlib.sha256(json.dumps([full, depends], sort_keys=True).encode()).hexdigest()[:10]
    method, found = None, {}
    for task in tasks:
        file = Path(settings.out) / "alone" / key / f"{task.name}.json"
        if not file.is_file():
            print(f"\n=== {task.name} alone ===", flush=True)
            method = method or start_method(kind, task, settings)
            learn(method, task, 0, settings)
            write(file, _test(method, task, settings))
        found[task.name] = json.loads(file.read_text())
    return found


def start_method(kind: type[Method], task: Task, settings: Settings) -> Method:
    """The method on a fresh base model, with the weights that it starts from."""
    model, tokenizer = load_model(settings.model)
    # greedy, and without what the model's own settings may ask for
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    set_seed(seed_of(settings, task))  # some methods make their weights here, others at the first task
    return kind(model.to(best_device()), tokenizer, settings)


def test(model: Any, tokenizer: Any, task: Task, settings: Settings) -> dict[str, str]:
    """By way of scoring one character a test question, 1 for a right answer."""
    return answered_right(model, tokenizer, task, settings.score, settings.max_tokens, settings.precision == "bf16")


def _test(method: Method, task: Task, settings: Settings) -> dict[str, str]:
    return test(method.predict(task), method.tokenizer, task, settings)


def write(path: Path, value: Any) -> None:
    """Write a complete file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(new, path)
