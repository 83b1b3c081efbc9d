"""The paper's figures from finished runs: PNG and SVG, with the numbers behind them as CSV.

python examples/continual_benchmark/figures.py runs/continual_benchmark --out runs/continual_benchmark/figures
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from continual_benchmark.collect import Run, comparable, read_runs
from continual_benchmark.scores import WAYS, all_tested, matrix_of
from peft_aso.metrics import average_accuracy, forgetting, forward_transfer

Row = dict[str, Any]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="figures.py", description="The paper's figures from finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="results folders, or folders that hold them")
    parser.add_argument("--out", type=Path, default=Path("runs/continual_benchmark/figures"))
    parser.add_argument("--way", choices=WAYS, default="generate", help="how answers were scored")
    return parser.parse_args(arguments)


def draw(options: argparse.Namespace) -> list[Path]:
    """All figures that the runs have the numbers for, one set an order."""
    runs = [run for run in read_runs(options.folders) if options.way in run.results["summary"]]
    comparable(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for order in sorted({run.order for run in runs}):
        here = [run for run in runs if run.order == order]
        name = f"order{order}" if order.isdigit() else order
        for topic, rows_of, draw_one in FIGURES:
            rows = rows_of(here, options.way)
            if rows:
                files += _save(options.out / f"{topic}_{name}", rows, draw_one)
    return files


def by_stage(measure: str) -> Callable[[list[Run], str], list[Row]]:
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


def coefficients(kind: str) -> Callable[[list[Run], str], list[Row]]:
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
    """psi of each layer at a task's end, where there is one a layer."""
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


def _name(run: Run, runs: list[Run]) -> str:
    seeds = {each.settings["seed"] for each in runs}
    return run.label if len(seeds) == 1 else f"{run.label}, seed {run.settings['seed']}"


# what a column of the tables is called beside an axis
_WORDS = {
    "AA": "average accuracy, %", "FM": "forgetting, points (lower is better)", "FWT": "forward transfer, points",
    "loss": "training loss", "similarity": "similarity w", "step": "step",
}  # fmt: skip


_STYLES = ("-", "--", ":", "-.")  # there are ten colours: the eleventh run has the first one's, dashed


def _lines(axes: Any, rows: list[Row]) -> None:
    x, y = ("stage" if "stage" in rows[0] else "step"), list(rows[0])[-1]
    for index, name in enumerate(dict.fromkeys(row["run"] for row in rows)):
        own = [row for row in rows if row["run"] == name]
        places, values = ([row[key] for row in own] for key in (x, y))
        style, marker = _STYLES[index // 10 % len(_STYLES)], "o" if x == "stage" else ""
        axes.plot(places, values, linestyle=style, marker=marker, markersize=4, label=name)
    if x == "stage":
        tasks = dict(sorted((row["stage"], row["task"]) for row in rows))
        axes.set_xticks(list(tasks), list(tasks.values()), rotation=30 if len(tasks) > 6 else 0)
    axes.set(xlabel="after learning" if x == "stage" else "step", ylabel=_WORDS[y])
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")


def _violins(axes: Any, rows: list[Row]) -> None:
    y = list(rows[0])[-1]
    tasks, runs = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "run"))
    for index, name in enumerate(runs):
        shift = (index - (len(runs) - 1) / 2) * 0.8 / len(runs)
        groups = [[row[y] for row in rows if (row["run"], row["task"]) == (name, task)] for task in tasks]
        full = [(place, values) for place, values in enumerate(groups) if len(values) > 1]
        if full:
            places, values = zip(*full, strict=True)
            axes.violinplot(
                list(values), [place + shift for place in places], widths=0.7 / len(runs), showmedians=True
            )
        flat = [(place + shift, value) for place, values in enumerate(groups) for value in values]
        axes.scatter(*zip(*flat, strict=True), s=6, label=name)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set(ylabel=f"{_WORDS.get(y, y)} to earlier tasks")
    axes.legend(fontsize="small")


def _pairs(axes: Any, rows: list[Row]) -> None:
    """psi by layer or by step, a line for each pair of tasks."""
    x = "layer" if "layer" in rows[0] else "step"
    pairs = dict.fromkeys((row["run"], row["task"], row["earlier"]) for row in rows)
    several = len({run for run, _, _ in pairs}) > 1
    for run, task, earlier in pairs:
        own = [row for row in rows if (row["run"], row["task"], row["earlier"]) == (run, task, earlier)]
        label = f"{task} to {earlier}" + f", {run}" * several
        style = "default" if x == "layer" else "steps-post"  # it stays as it is until the next refresh
        axes.plot([row[x] for row in own], [row["psi"] for row in own], drawstyle=style, label=label)
    axes.set(xlabel=x if x == "layer" else "step of the task", ylabel="psi")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="x-small")


def _grids(axes: Any, rows: list[Row]) -> None:
    """One grid a run, in the place of the axes."""
    runs, figure = list(dict.fromkeys(row["run"] for row in rows)), axes.figure
    across = math.ceil(math.sqrt(len(runs)))
    down = math.ceil(len(runs) / across)
    if len(runs) > 1:
        axes.remove()
        figure.set_size_inches(5 * across, 4 * down)
    places = [axes] if len(runs) == 1 else figure.subplots(down, across, squeeze=False).flat
    for run, place in itertools.zip_longest(runs, places):
        if run is None:
            place.remove()
        else:
            _grid(place, [row for row in rows if row["run"] == run])


def _grid(axes: Any, rows: list[Row]) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    values = {(row["task"], row["other"]): row["similarity"] for row in rows}
    image = axes.imshow([[values.get((a, b), math.nan) for b in tasks] for a in tasks], vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.figure.colorbar(image, ax=axes, label="similarity of outputs")
    axes.set_title(rows[0]["run"], fontsize="small")


FIGURES: list[tuple[str, Callable[[list[Run], str], list[Row]], Callable[[Any, list[Row]], None]]] = [
    ("average_accuracy", by_stage("AA"), _lines),
    ("forgetting", by_stage("FM"), _lines),
    ("forward_transfer", by_stage("FWT"), _lines),
    ("loss", losses, _lines),
    ("similarity", coefficients("similarity"), _violins),
    ("psi", coefficients("psi"), _violins),
    ("psi_by_step", steps, _pairs),
    ("psi_by_layer", layers, _pairs),
    ("outputs", agreement, _grids),
]


def _save(path: Path, rows: list[Row], draw_one: Callable[[Any, list[Row]], None]) -> list[Path]:
    table = path.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    draw_one(figure.subplots(), rows)
    pictures = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for picture in pictures:
        figure.savefig(picture, dpi=150)
    return [table, *pictures]


if __name__ == "__main__":
    for written in draw(parse()):
        print(written)
