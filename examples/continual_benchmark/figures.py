"""The paper's figures from finished runs: PNG and SVG, with the numbers behind them as CSV.

python examples/continual_benchmark/figures.py runs/continual_benchmark --out runs/continual_benchmark/figures
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from continual_benchmark import series
from continual_benchmark.collect import comparable, read_runs
from continual_benchmark.scores import WAYS
from continual_benchmark.series import Row, RowsOf


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
    _legend(axes)


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
    _legend(axes)


def _pairs(axes: Any, rows: list[Row]) -> None:
    """psi by layer or by step: a colour for each pair of tasks, a dash for each run."""
    x = "layer" if "layer" in rows[0] else "step"
    runs = list(dict.fromkeys(row["run"] for row in rows))
    pairs = list(dict.fromkeys((row["task"], row["earlier"]) for row in rows))
    for (place, run), (index, (task, earlier)) in itertools.product(enumerate(runs), enumerate(pairs)):
        own = [row for row in rows if (row["run"], row["task"], row["earlier"]) == (run, task, earlier)]
        label = f"{task} to {earlier}" + f", {run}" * (len(runs) > 1)
        style = "default" if x == "layer" else "steps-post"  # it stays as it is until the next refresh
        dash = _STYLES[(place * math.ceil(len(pairs) / 10) + index // 10) % len(_STYLES)]
        places, values = ([row[key] for row in own] for key in (x, "psi"))
        if own:
            axes.plot(places, values, drawstyle=style, linestyle=dash, color=f"C{index % 10}", label=label)
    axes.set(xlabel=x if x == "layer" else "step of the task", ylabel="psi")
    axes.grid(True, alpha=0.3)
    _legend(axes)


def _strengths(axes: Any, rows: list[Row]) -> None:
    """A line over lambda for each kind of run, with intervals, side by side where lambda is the same."""
    kinds = list(dict.fromkeys(row["run"] for row in rows))
    for index, kind in enumerate(kinds):
        own = [row for row in rows if row["run"] == kind]
        gaps = [row["difference"] for row in own]
        places = [row["lambda"] * 1.08 ** (index - (len(kinds) - 1) / 2) for row in own]
        axes.errorbar(places, gaps, yerr=_reach(own), marker="o", markersize=4, capsize=3, label=kind)
    axes.axhline(0, color="black", linewidth=1, linestyle="--", label="no penalty (IncLoRA)")
    axes.set(xscale="log", xlabel="lambda", ylabel="average accuracy, points above no penalty")
    axes.grid(True, alpha=0.3)
    _legend(axes)


def _beside_none(axes: Any, rows: list[Row]) -> None:
    """One line a run, the best on top, soft and hard in colours of their own."""
    ordered = sorted(rows, key=lambda row: row["difference"])
    width, height = axes.figure.get_size_inches()
    names = [textwrap.fill(row["run"], 80) for row in ordered]
    deepest = max(name.count("\n") for name in names)  # rows are equally far apart
    axes.figure.set_size_inches(width + 3, max(height / 2, 1.5 + (0.3 + 0.1 * deepest) * len(rows)))
    for psi in sorted({row["psi"] for row in rows}, reverse=True):
        own = [(place, row) for place, row in enumerate(ordered) if row["psi"] == psi]
        places, of_psi = [place for place, _ in own], [row for _, row in own]
        gaps = [row["difference"] for row in of_psi]
        axes.errorbar(gaps, places, xerr=_reach(of_psi), fmt="o", markersize=4, capsize=3, label=f"psi {psi}")
    axes.axvline(0, color="black", linewidth=1, linestyle="--", label="no penalty (IncLoRA)")
    axes.set_yticks(range(len(ordered)), names, fontsize="small")
    axes.set(xlabel="average accuracy, points above no penalty")
    axes.grid(True, axis="x", alpha=0.3)
    _legend(axes)


def _reach(rows: list[Row]) -> list[list[float]]:
    """How far each difference's interval goes down and up from it."""
    return [[row["difference"] - row["low"] for row in rows], [row["high"] - row["difference"] for row in rows]]


def _legend(axes: Any) -> None:
    """Below the picture, where it hides nothing, and the picture no smaller for it."""
    labels = axes.get_legend_handles_labels()[1]
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width, height + 0.2 * math.ceil(len(labels) / 2))
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize="small")


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


FIGURES: list[tuple[str, RowsOf, Callable[[Any, list[Row]], None]]] = [
    ("average_accuracy", series.by_stage("AA"), _lines),
    ("forgetting", series.by_stage("FM"), _lines),
    ("forward_transfer", series.by_stage("FWT"), _lines),
    ("loss", series.losses, _lines),
    ("similarity", series.coefficients("similarity"), _violins),
    ("psi", series.coefficients("psi"), _violins),
    ("psi_by_step", series.steps, _pairs),
    ("psi_by_layer", series.layers, _pairs),
    ("outputs", series.agreement, _grids),
    ("penalty_weight", series.by_weight, _strengths),
    ("penalties", series.by_penalty, _beside_none),
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
