"""Pictures and tables on disk: one PNG, one SVG and one CSV a topic."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curves = Mapping[str, Sequence[tuple[float, float]]]


def save_curves(
    folder: Path, name: str, curves: Curves, *, title: str, x: str, y: str, logarithmic: bool = True
) -> list[Path]:
    """Draw curves of (x, y) points, as `name.png` and `name.svg`.

    Points that are zero, which a logarithmic scale cannot show, are left out there. Curves whose name begins with "="
    are horizontal lines.

    Returns:
        The files; none, with a message, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print('No picture: it needs matplotlib, pip install "peft-aso[plots]".')
        return []
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = itertools.cycle([(":", "0.1"), ("--", "0.4"), ("-.", "0.6")])
    for label, points in curves.items():
        shown = [(a, b) for a, b in points if b > 0 or not logarithmic]
        if label.startswith("="):
            style, grey = next(lines)
            axes.axhline(shown[0][1] if shown else 0.0, linestyle=style, color=grey, label=label[1:].strip())
        else:
            places, values = [point[0] for point in shown], [point[1] for point in shown]
            axes.plot(places, values, marker="o" if logarithmic else "", markersize=4, label=label)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def save_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `name.csv`, one row each; the columns are the first row's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows as text."""
    heads = list(rows[0])

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [[cell(row[head]) for head in heads] for row in rows]
    widths = [max(len(head), *(len(row[column]) for row in cells)) for column, head in enumerate(heads)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in [heads, *cells]
    )
