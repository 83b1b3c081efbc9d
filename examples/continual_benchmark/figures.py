"""Two figures of finished runs: average accuracy after each task, and psi by step.

    python examples/continual_benchmark/figures.py docs/results/continual.jsonl.xz --out docs/results/figures \
      --only "orders/*lora*"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from continual_benchmark.data import short
from continual_benchmark.records import Record, read_records
from continual_benchmark.scores import WAYS, matrices, ways_of
from continual_benchmark.table import label
from peft_aso.metrics import average_accuracy

# Okabe and Ito's colours, which colour-blind readers tell apart; a dash and a marker each besides
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
CJK = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "IPAGothic", "PingFang SC", "Microsoft YaHei")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="figures.py", description="Figures of finished runs.")
    parser.add_argument("paths", nargs="+", type=Path, help="compressed files, or folders of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/continual_benchmark/figures"))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of runs' names")
    parser.add_argument("--way", choices=WAYS, default="generate", help="how answers were scored")
    return parser.parse_args(arguments)


def draw(options: argparse.Namespace) -> list[Path]:
    """Draw what the runs have the numbers for, a panel for each order; the files."""
    runs = [run for run in read_records(options.paths, options.only) if options.way in ways_of(run)]
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CJK if name in known)]
    with_psi = [run for run in runs if _psi(run)]
    files = []
    # 9 points and more where the picture is 800 pixels wide
    with matplotlib.rc_context({"font.family": fonts, "font.size": 13}):
        for name, drawn, panel in (("average_accuracy", runs, _accuracy), ("psi", with_psi, _steps)):
            if drawn:
                files.append(options.out / f"{name}.png")
                _save(files[-1], drawn, panel, options.way)
    return files


def _save(path: Path, runs: list[Record], panel: Any, way: str) -> None:
    orders = list(dict.fromkeys(short(run["tasks"]) for run in runs))
    figure = Figure(figsize=(11, 4.8 * -(-len(orders) // 3) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    columns = min(3, len(orders))
    grid = figure.subplots(-(-len(orders) // columns), columns, squeeze=False, sharey=True).flat
    handles: dict[str, Any] = {}
    names = list(dict.fromkeys(label(run, runs) for run in runs))
    for order, axes in zip(orders, grid, strict=False):
        here = [run for run in runs if short(run["tasks"]) == order]
        panel(axes, here, runs, names, way)
        axes.set_title(f"order {order}" if order.isdigit() else order, fontsize=13)
        axes.grid(True, alpha=0.3)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in list(grid)[len(orders) :]:
        axes.remove()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _accuracy(axes: Any, runs: list[Record], all_runs: list[Record], names: list[str], way: str) -> None:
    """Average accuracy after each stage at which all tasks so far were tested."""
    for run in runs:
        matrix, place = matrices(run, way, 0)[0][0].tolist(), names.index(label(run, all_runs))
        done = [at for at in range(len(matrix)) if not any(v != v for v in matrix[at][: at + 1])]
        axes.plot(
            [at + 1 for at in done], [average_accuracy(matrix, stage=at) for at in done], label=names[place],
            color=COLORS[place % 7], linestyle=DASHES[place % 4], marker=MARKERS[place % 7],
        )  # fmt: skip
    axes.set_xticks(range(1, len(runs[0]["tasks"]) + 1), runs[0]["tasks"], rotation=30)
    axes.set(xlabel="after learning", ylabel="average accuracy, %" if axes.get_subplotspec().is_first_col() else "")


def _psi(run: Record) -> list[tuple[str, list[float | None]]]:
    """psi of each task to each earlier one ("amazon to dbpedia") by step, where it comes from a w."""
    return [
        (f"{stage['task']} to {name.split('/', 1)[1]}", stage["log"][name.replace("similarity", "psi", 1)])
        for stage in run["stages"]
        for name in stage.get("log", {})
        if name.startswith("similarity/")
    ]


def _steps(axes: Any, runs: list[Record], all_runs: list[Record], names: list[str], way: str) -> None:
    """psi by step of the later task: a line for each pair of tasks of each run."""
    pairs = list(dict.fromkeys(name for run in all_runs for name, _ in _psi(run)))
    for run in runs:
        for name, values in _psi(run):
            place = pairs.index(name)
            shown = f"{name}, {label(run, all_runs)}" if len(names) > 1 else name
            style = DASHES[(place // 7 + names.index(label(run, all_runs))) % 4]
            axes.plot(range(1, len(values) + 1), values, style, color=COLORS[place % 7], label=shown)
    axes.set(xlabel="step", ylabel="psi" if axes.get_subplotspec().is_first_col() else "")


if __name__ == "__main__":
    for written in draw(parse()):
        print(written)
