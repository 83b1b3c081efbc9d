"""Two pictures of a chain of tasks: accuracy of each task after each stage, and how alike the tasks are.

Needs matplotlib, which is optional: `pip install "peft-aso[plots]"`. Figures are drawn on a canvas of their
own (Agg): the caller's backend, style and open figures stay as they are. The colour maps keep their order
for colour-blind readers and in grey, and each cell carries its number.
"""

from __future__ import annotations

import math
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_aso.metrics import AccuracyMatrix, in_percent, read_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pair = float | Sequence[float] | None  # one number, or one a layer
Similarities = Sequence[Sequence[Pair]] | Mapping[str, Mapping[str, Pair]]

CELL = 0.62  # inches a cell takes in a figure of our own
LABEL_WIDTH = 18  # characters a line of a task's name may have


def plot_accuracy(matrix: AccuracyMatrix, tasks: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the accuracy of each task (column) after each training stage (row), in percent.

    Args:
        matrix: `(stages, tasks)` accuracies as in `peft_aso.metrics`, in fractions or percent; `None` or
            NaN leaves a cell blank.
        tasks: the tasks' names in the order learned, one per column.
        ax: the axes to draw on; a new figure of its own if left out (`ax.figure` has it).

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a malformed matrix, or another number of tasks.
    """
    rows = read_matrix(matrix)
    _check_tasks(tasks, len(rows[0]), "The accuracy matrix")
    percent = rows if in_percent(rows) else [[100 * value for value in row] for row in rows]
    ax = _new_axes(len(tasks), len(rows)) if ax is None else ax
    _heat_map(ax, percent, tasks[: len(rows)], tasks, limits=(0, 100), colours="cividis")
    _describe(ax, "Accuracy after each stage (%)", "task", "after training on")
    return ax


def plot_similarity(similarities: Similarities, tasks: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the similarity w (Eq. 13) of each task (row) with each task of its history (column).

    The first task has no history and the last is in nobody's, so there is no row for the one and no column
    for the other.

    Args:
        similarities: `(tasks, tasks)` values in [-1, 1], row the current task, column the history's, of
            which only those below the diagonal are read; or a mapping from a task's name to the
            similarities with its history by name, `{"amazon": {"dbpedia": 0.57}}`. What is `None`, NaN or
            left out is blank; of a list with one value a layer the mean is drawn.
        tasks: the tasks' names in the order learned.
        ax: the axes to draw on; a new figure of its own if left out (`ax.figure` has it).

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another shape, a name that is no task, a task given as history of an earlier one, or a
            value outside [-1, 1].
    """
    rows = _read_similarities(similarities, tasks)
    pairs = len(tasks) - 1
    ax = _new_axes(max(pairs, 2), max(pairs, 2)) if ax is None else ax
    if pairs:
        below = [[row[j] if j < t else math.nan for j in range(pairs)] for t, row in enumerate(rows)][1:]
        _heat_map(ax, below, tasks[1:], tasks[:-1], limits=(-1, 1), colours="PuOr_r")
    else:
        ax.text(0.5, 0.5, "one task: no pairs", ha="center", va="center", transform=ax.transAxes)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    _describe(ax, "Similarity w of each pair", "history", "current task")
    return ax


def plot_overview(
    matrix: AccuracyMatrix, similarities: Similarities, tasks: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Save accuracy and similarity side by side as one picture.

    Args:
        matrix: as for `plot_accuracy`.
        similarities: as for `plot_similarity`.
        tasks: the tasks' names in the order learned.
        path: where to save; ".png" or ".svg" says which format. Missing folders are made, an older picture
            is replaced only when the new one is complete.

    Returns:
        The path of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another file ending, or what the two functions refuse.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"Cannot save a picture as {path.name!r}: end the path in .png or .svg.")
    side = CELL * max(len(tasks), 3)
    margin = 2.9  # names on the left, the colour bar on the right
    figure = _new_figure(2 * (side + margin), side + 2.2)
    left, right = figure.subplots(1, 2)
    plot_accuracy(matrix, tasks, ax=left)
    plot_similarity(similarities, tasks, ax=right)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".picture-") as folder:
        finished = Path(folder) / path.name
        figure.savefig(finished, format=kind, dpi=150)
        os.replace(finished, path)
    return path


def _heat_map(
    ax: Axes,
    rows: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    limits: tuple[float, float],
    colours: str,
) -> None:
    """One coloured cell with its number per entry; NaN entries stay blank."""
    low, high = limits
    image = ax.imshow(rows, cmap=colours, vmin=low, vmax=high, aspect="equal")
    shades = image.to_rgba(np.asarray(rows))
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            # Where black and white contrast equally with the colour below.
            dark = _luminance(shades[y][x]) < 0.179
            colour = "white" if dark else "black"
            ax.text(x, y, _number(value, high), ha="center", va="center", fontsize=9, color=colour)
    ax.set_xticks(range(len(column_names)), [_wrapped(name) for name in column_names])
    ax.tick_params(axis="x", labelrotation=45)
    ax.set_yticks(range(len(row_names)), [_wrapped(name) for name in row_names])
    for label in ax.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    for label in ax.get_xticklabels() + ax.get_yticklabels():
        label.set_parse_math(False)  # a name may hold dollar signs
    ax.tick_params(axis="both", length=0, labelsize=9)
    # Lines in the background's colour part the cells.
    ax.set_xticks([x + 0.5 for x in range(len(column_names) - 1)], minor=True)
    ax.set_yticks([y + 0.5 for y in range(len(row_names) - 1)], minor=True)
    ax.grid(which="minor", color=ax.get_facecolor(), linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.03)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _describe(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, pad=10)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def _read_similarities(similarities: Similarities, tasks: Sequence[str]) -> list[list[float]]:
    """A checked `(tasks, tasks)` copy, NaN where there is no value."""
    _check_tasks(tasks, len(tasks), "The similarities")
    table = _by_position(similarities, tasks) if isinstance(similarities, Mapping) else similarities
    rows = [[_one(value) for value in row] for row in table]
    count = len(tasks)
    if len(rows) != count or any(len(row) != count for row in rows):
        shape = f"{len(rows)} rows of {sorted({len(row) for row in rows})} entries"
        raise ValueError(
            f"The similarities have {shape} for {count} tasks: give a square, row the current task and "
            "column the history's, or a mapping by name."
        )
    for t, row in enumerate(rows):
        for j, value in enumerate(row[:t]):
            # A little room for rounding.
            if not (math.isnan(value) or abs(value) <= 1 + 1e-6):
                raise ValueError(
                    f"The similarity of {tasks[t]!r} with {tasks[j]!r} is {value}: a correlation lies in [-1, 1]."
                )
    return rows


def _one(value: Pair) -> float:
    """One number for a pair: the mean of one a layer, NaN where there is none."""
    if isinstance(value, Sequence):
        return math.fsum(value) / len(value) if value else math.nan
    return math.nan if value is None else float(value)


def _by_position(similarities: Mapping[str, Mapping[str, Pair]], tasks: Sequence[str]) -> list[list[Pair]]:
    """The mapping as a square; names are looked up in `tasks`."""
    place = {task: index for index, task in enumerate(tasks)}
    square: list[list[Pair]] = [[None] * len(tasks) for _ in tasks]
    for current, history in similarities.items():
        for old, value in history.items():
            for name in (current, old):
                if name not in place:
                    raise ValueError(f"The similarities name {name!r}, none of the tasks {list(tasks)}.")
            if place[old] >= place[current]:
                raise ValueError(f"{old!r} cannot be history of {current!r}: tasks are in the order learned.")
            square[place[current]][place[old]] = value
    return square


def _check_tasks(tasks: Sequence[str], count: int, what: str) -> None:
    if isinstance(tasks, str) or len(tasks) != count or not tasks:
        given = repr(tasks) if isinstance(tasks, str) else f"{len(tasks)} names"
        raise ValueError(f"{what}: {given} for {count} tasks. Give a list with one name per task.")
    twice = next((task for index, task in enumerate(tasks) if task in tasks[:index]), None)
    if twice is not None:
        raise ValueError(f"{what}: the name {twice!r} is there twice. Give every task a name of its own.")


def _new_axes(columns: int, rows: int) -> Axes:
    """Axes of a new figure with room for the cells, the names and the colour bar."""
    return _new_figure(CELL * max(columns, 3) + 2.9, CELL * max(rows, 3) + 2.2).subplots()


def _new_figure(width: float, height: float) -> Figure:
    """A figure (inches) on an Agg canvas, outside pyplot, which would keep it and may open a window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib, which is not installed: pip install "peft-aso[plots]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance in [0, 1] of an sRGB colour (WCAG 2), to choose black or white text on it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _number(value: float, high: float) -> str:
    """A percentage with one digit after the point, a correlation with two; no minus before a zero."""
    digits = 1 if high == 100 else 2
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _wrapped(name: str) -> str:
    """A task's name on at most two lines, the rest cut with an ellipsis."""
    lines = textwrap.wrap(name, LABEL_WIDTH) or [name]
    if len(lines) > 2:
        lines = [lines[0], lines[1][: LABEL_WIDTH - 1].rstrip() + "…"]
    return "\n".join(lines)
