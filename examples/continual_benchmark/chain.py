"""A whole run: an order of tasks learned one after another, all tested after each."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tasks import Task, best_device, load_model
from transformers import set_seed

from .alone import alone_folder, learn_alone
from .data import read_tasks
from .evaluation import Answers, answer, output_similarity
from .first import keep_first, take_first
from .methods import METHODS, Method
from .orders import order_of, short
from .results import Correct, RunFolder, folder_of, read_json
from .scores import summary
from .settings import Settings
from .training import in_bf16, learn, seed_of


def run(settings: Settings) -> dict[str, Any]:
    """Run, or go on with a run that was stopped; the results, which are on disk too.

    Raises:
        SystemExit: settings that are wrong, tasks that are not there, a folder that holds another run.
    """
    if torch.cuda.device_count() > 1:
        raise SystemExit("A run has one GPU to itself: choose it with CUDA_VISIBLE_DEVICES=0.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    names = order_of(settings.order)
    tasks = read_tasks(names, settings)
    path = folder_of(settings, short(names))
    settings = _decided(settings, path)
    with RunFolder(path, settings.chosen()) as folder:
        results = folder.results()
        if results is None or not (results["alone"] or settings.no_reference):
            results = _run(tasks, settings, folder)
    return {**results, "folder": str(folder.path)}


def _decided(settings: Settings, path: Path) -> Settings:
    """With `--precision auto`, what the run in that folder began with, or else what is faster here."""
    if settings.precision != "auto":
        return settings
    began = (read_json(path / "settings.json") or {}).get("precision")
    return replace(settings, precision=began or ("bf16" if in_bf16(settings) else "float32"))


def _run(tasks: list[Task], settings: Settings, folder: RunFolder) -> dict[str, Any]:
    names = [task.name for task in tasks]
    load = functools.cache(functools.partial(_load, settings.model))
    kind = METHODS[settings.method]
    if kind.alone:
        stages = _as_stages(tasks, learn_alone(tasks, settings, load))
    else:
        if folder.done < len(tasks):
            base = load()
            set_seed(seed_of(settings, tasks[0]))  # some methods make their weights here, as others at the first task
            _learn_chain(tasks, settings, folder, kind(*base, settings))
        stages = folder.stages()
    reference = None
    if not (settings.no_reference and not kind.alone):
        load = functools.cache(functools.partial(_load, settings.model))  # the base model, untouched
        reference = {name: each["correct"] for name, each in learn_alone(tasks, settings, load).items()}
    results = {
        "title": kind.title,
        "tasks": names,
        "settings": settings.chosen(),
        "stages": stages,
        "alone": reference,
        "alone in": str(alone_folder(settings)) if reference is not None else None,
        "summary": summary(names, [stage["correct"] for stage in stages], reference),
    }
    folder.finish(results)
    return results


def _load(name: str) -> tuple[Any, Any]:
    model, tokenizer = load_model(name)
    return model.to(best_device()), tokenizer


def _learn_chain(tasks: list[Task], settings: Settings, folder: RunFolder, method: Method) -> None:
    if len(tasks) > 1 and folder.done == 0 and take_first(settings, tasks[0], folder):
        print(f"{tasks[0].name} was learned by an earlier run in the same way.")
    done, trained = folder.done, folder.trained()
    have = done + (trained is not None)
    if have:
        print(f"Going on after {tasks[have - 1].name}, which {folder.path} has.")
        method.restore(folder.state(have - 1), tasks[:have])
    for index, task in enumerate(tasks[done:], start=done):
        print(f"\n=== {method.title}, stage {index + 1} of {len(tasks)}: {task.name} ===", flush=True)
        if trained is None:
            trained = _trained(method, task, index, settings)
            folder.add_state(method.save, trained)
        tested = [task] if settings.tested == "new" and index < len(tasks) - 1 else tasks[: index + 1]
        stage = {**trained, **_tested(method, tested, settings, last=index == len(tasks) - 1)}
        stage["seconds"] = {**trained["seconds"], **stage["seconds"]}
        folder.add_stage(stage)
        trained = None
        if index == 0 and len(tasks) > 1:
            keep_first(settings, task, folder, stage)
        print(_line(stage["correct"]) + f"   ({sum(stage['seconds'].values()):.0f} s)", flush=True)


def _trained(method: Method, task: Task, index: int, settings: Settings) -> dict[str, Any]:
    """Train; what is known of the stage then."""
    started = time.time()
    log = learn(method, task, index, settings)
    seconds = {"training": time.time() - started}
    return {"task": task.name, "log": log, "seconds": seconds, **method.facts(task)}


def _tested(method: Method, tasks: list[Task], settings: Settings, last: bool) -> dict[str, Any]:
    """Test on these tasks; what the stage has from that."""
    started = time.time()
    said = _test(method, tasks, settings)
    found: dict[str, Any] = {
        "correct": {task.name: said[task.name].correct(task) for task in tasks},
        "seconds": {"testing": time.time() - started},
        "said": {task.name: said[task.name].said(task) for task in tasks},
    }
    if last:
        found["outputs"] = output_similarity({name: each.outputs for name, each in said.items()})
    return found


def _test(method: Method, tasks: list[Task], settings: Settings) -> dict[str, Answers]:
    found = {}
    for task in tasks:
        with method.predict(task) as model:
            found[task.name] = answer(
                model, method.tokenizer, task, settings.score, settings.max_tokens, in_bf16(settings)
            )
    return found


def _as_stages(tasks: list[Task], alone: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Models that forget nothing: after each stage every earlier task is as it was."""
    stages = []
    for index, task in enumerate(tasks):
        right = {each.name: alone[each.name]["correct"] for each in tasks[: index + 1]}
        stages.append({**alone[task.name], "correct": right})
    return stages


def _line(right: Correct) -> str:
    def percent(answers: list[bool]) -> str:
        return f"{100 * sum(answers) / len(answers):.0f}%"

    return ", ".join(f"{name} {' / '.join(percent(each) for each in ways.values())}" for name, ways in right.items())
