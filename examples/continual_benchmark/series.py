"""The numbers behind the figures: rows of finished runs of one order, the measure last."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peft_aso.metrics import average_accuracy, forgetting, forward_transfer

from .collect import Run, label_of, penalty_of, without_penalty
from .scores import all_tested, difference, matrix_of

Row = dict[str, Any]
RowsOf = Callable[[list[Run], str], list[Row]]  # of these runs, with answers scored in this way


def by_stage(measure: str) -> RowsOf:
    """AA, FM or FWT after each stage (Figures 4, 7, 8, 10, 11)."""

    def rows_of(runs: list[Run], way: str) -> list[Row]:
        rows = []
        for run in runs:
            stages = [stage["correct"] for stage in run.results["stages"]]
            matrix = matrix_of(run.results["tasks"], stages, way)
            alone = run.results["summary"][way]["alone"]
            for stage, task in enumerate(run.results["tasks"]):
                value, tested = math.nan, all_tested(run.results, stage + 1)
                if measure == "AA" and tested:
                    value = average_accuracy(matrix, stage=stage)
                elif measure == "FM" and tested and stage:
                    value = forgetting(matrix, stage=stage)
                elif measure == "FWT" and stage and alone:
                    value = forward_transfer(matrix, alone, stage=stage)
                if not math.isnan(value):
                    rows.append({"run": _name(run, runs), "stage": stage + 1, "task": task, measure: value})
        return rows

    return rows_of


def losses(runs: list[Run], way: str) -> list[Row]:
    """The training loss at each step of the chain (Figure 9)."""
    rows = []
    for run in runs:
        step = 0
        for stage in run.results["stages"]:
            for entry in stage["log"]:
                step += 1
                loss = entry.get("task_loss", entry["loss"])
                rows.append({"run": _name(run, runs), "step": step, "task": stage["task"], "loss": loss})
    return rows


def coefficients(kind: str) -> RowsOf:
    """w or psi of each task to each earlier one, at each refresh (Figures 3, 6), where psi comes from a w."""

    def rows_of(runs: list[Run], way: str) -> list[Row]:
        rows = []
        for run in runs:
            for stage in run.results["stages"]:
                start = {"run": _name(run, runs), "task": stage["task"]}
                for found in _changes([_to_earlier(entry, kind) for entry in stage["log"]]):
                    rows += [{**start, "earlier": earlier, kind: value} for earlier, value in found.items()]
        return rows

    return rows_of


def _to_earlier(entry: dict[str, float], kind: str) -> dict[str, float]:
    """w or psi to each earlier task in the log of a step, the mean over layers where there is one a layer."""
    earlier = [name.split("/", 1)[1] for name in entry if name.startswith("similarity/")]  # none where psi is set to 1
    return {name: entry[f"{kind}/{name}"] for name in earlier}


def _changes(found: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without what is empty or as before: psi changes at refreshes."""
    return [now for before, now in zip([{}, *found], found, strict=False) if now and now != before]


def steps(runs: list[Run], way: str) -> list[Row]:
    """psi at each step of a task, where psi comes from a w."""
    return [
        {"run": _name(run, runs), "task": stage["task"], "earlier": earlier, "step": step, "psi": value}
        for run in runs
        for stage in run.results["stages"]
        for step, entry in enumerate(stage["log"], start=1)
        for earlier, value in _to_earlier(entry, "psi").items()
    ]


def layers(runs: list[Run], way: str) -> list[Row]:
    """psi of each layer as a task last had it, where there is one a layer."""
    return [
        {"run": _name(run, runs), "task": stage["task"], "earlier": earlier, "layer": layer, "psi": value}
        for run in runs
        for stage in run.results["stages"]
        for earlier, values in stage.get("psi", {}).items()
        if isinstance(values, list)
        for layer, value in enumerate(values)
    ]


def agreement(runs: list[Run], way: str) -> list[Row]:
    """How alike the tasks' outputs are after the last stage (Figure 5), where the run has them."""
    return [
        {"run": _name(run, runs), "task": a, "other": b, "similarity": value}
        for run in runs
        for a, others in run.results["stages"][-1].get("outputs", {}).items()
        for b, value in others.items()
    ]


def by_weight(runs: list[Run], way: str) -> list[Row]:
    """AA less that of the same run without a penalty, and its paired 95% interval, for what was run with several
    lambdas."""
    kinds: dict[str, dict[float, list[Any]]] = {}
    for run in runs:
        weights, none = run.settings["penalty_weight"] or [], without_penalty(run, runs)
        if any(weights) and len(weights) == 1 and none:
            kind = _name(run, runs, label_of(run, runs, but=["penalty_weight"]))
            kinds.setdefault(kind, {})[weights[0]] = [run.results, none.results, way]
    several = {kind: weights for kind, weights in kinds.items() if len(weights) > 1}
    rows = []
    for kind, weights in several.items():
        for weight, pair in sorted(weights.items()):
            gap, (low, high) = difference(*pair)
            rows.append({"run": kind, "lambda": weight, "low": low, "high": high, "difference": gap})
    return rows


def by_penalty(runs: list[Run], way: str) -> list[Row]:
    """Of each run with a penalty, AA less that of the same run without, and its paired 95% interval."""
    rows = []
    for run in runs:
        penalty, none = penalty_of(run), without_penalty(run, runs)
        if penalty and none:
            gap, (low, high) = difference(run.results, none.results, way)
            psi = "1 (hard)" if penalty[2] else "soft"
            rows.append({"run": _name(run, runs), "psi": psi, "low": low, "high": high, "difference": gap})
    return rows


def _name(run: Run, runs: list[Run], label: str | None = None) -> str:
    seeds = {each.settings["seed"] for each in runs}
    return (label or run.label) + (f", seed {run.settings['seed']}" if len(seeds) > 1 else "")
