"""Two pictures of a chain of tasks: accuracy of each task after each stage, and the similarity of each pair of tasks.

Needs matplotlib, which is optional: `pip install "peft-aso[plots]"`. New figures have an Agg canvas outside pyplot:
the caller's backend, style and open figures stay as they are. The colour maps keep their order for colour-blind
readers and in grey, and each cell shows its number. Names in Chinese, Japanese or Korean take an installed font that
has them, such as Noto Sans CJK.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .metrics import AccuracyMatrix, in_percent, read_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pair = float | Sequence[float] | None  # one number, or one per layer
Similarities = Sequence[Sequence[Pair]] | Mapping[str, Mapping[str, Pair]]

CELL = 0.62  # inches of a cell
MARGINS = 2.9, 2.2  # inches around the cells: names and colour bar, names and title
LABEL_WIDTH = 18  # characters of a line of a task's name
CJK_FONTS = ("CJK", "Han S", "Hei", "Gothic", "PingFang", "Hiragino", "SimSun", "Unicode MS")  # parts of their names


def cjk_fonts() -> list[str]:
    """The installed fonts that have Chinese, Japanese or Korean characters, by their names."""
    from matplotlib.font_manager import get_font_names

    return [font for font in get_font_names() if any(part in font for part in CJK_FONTS)]


def plot_accuracy(matrix: AccuracyMatrix, tasks: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the accuracy of each task (column) after each training stage (row), in percent.

    Args:
        matrix: `(stages, tasks)` accuracies as in `peft_aso.metrics`, in fractions or percent; the cell of `None` or
            NaN is blank.
        tasks: the tasks' names in the order learned, one per column.
        ax: the axes to draw on; the default is a new figure (`ax.figure`).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a malformed matrix, or another number of tasks.
    """
    rows = read_matrix(matrix)
    _check_tasks(tasks, len(rows[0]), "The accuracy matrix")
    percent = rows if in_percent(rows) else [[100 * value for value in row] for row in rows]
    ax = ax or _new_figure(*_size(len(tasks), len(rows))).subplots()
    _heat_map(ax, percent, tasks[: len(rows)], tasks, limits=(0, 100), colours="cividis")
    ax.set(title="Accuracy after each stage (%)", xlabel="task", ylabel="after training on")
    return ax


def plot_similarity(similarities: Similarities, tasks: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the similarity w (Eq. 13) of each task (row) with each task of its history (column).

    Args:
        similarities: `(tasks, tasks)` values in [-1, 1], row the current task, column the history's, of which only
            those below the diagonal are read; or a mapping from a task's name to its similarities by name,
            `{"amazon": {"dbpedia": 0.57}}`. The cell of `None`, NaN or a missing pair is blank; of a list with one
            value per layer the mean is drawn.
        tasks: the tasks' names in the order learned.
        ax: the axes to draw on; the default is a new figure (`ax.figure`).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another shape, an unknown name, a task given as history of an earlier one, or a value outside
            [-1, 1].
    """
    rows = _read_similarities(similarities, tasks)
    pairs = len(tasks) - 1  # the first task has no history, the last is in nobody's
    ax = ax or _new_figure(*_size(pairs, pairs)).subplots()
    if pairs:
        below = [[row[j] if j < t else math.nan for j in range(pairs)] for t, row in enumerate(rows)][1:]
        _heat_map(ax, below, tasks[1:], tasks[:-1], limits=(-1, 1), colours="PuOr_r")
    else:
        ax.text(0.5, 0.5, "one task: no pairs", ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    ax.set(title="Similarity w of each pair", xlabel="history", ylabel="current task")
    return ax


def plot_overview(
    matrix: AccuracyMatrix, similarities: Similarities, tasks: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Save accuracy and similarity as one picture.

    Args:
        matrix: as for `plot_accuracy`.
        similarities: as for `plot_similarity`.
        tasks: the tasks' names in the order learned.
        path: a file name that ends in ".png" or ".svg". Missing folders are made.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another file ending, and as for the two functions.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"Cannot save a picture as {path.name!r}. End the path in .png or .svg.")
    width, height = _size(len(tasks), len(tasks))
    left, right = _new_figure(2 * width, height).subplots(1, 2)
    plot_accuracy(matrix, tasks, ax=left)
    plot_similarity(similarities, tasks, ax=right)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()  # an older picture stays if this one cannot be drawn
    left.figure.savefig(picture, format=kind, dpi=150)
    path.write_bytes(picture.getvalue())
    return path


def _heat_map(
    ax: Axes, rows: Sequence[Sequence[float]], row_names: Sequence[str], column_names: Sequence[str], *,
    limits: tuple[float, float], colours: str,
) -> None:  # fmt: skip
    """One coloured cell with its number per entry; NaN entries stay blank."""
    from matplotlib import rcParams

    image = ax.imshow(rows, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="equal")
    shades = image.to_rgba(np.asarray(rows))
    digits = 1 if limits[1] == 100 else 2
    for (y, x), value in np.ndenumerate(np.asarray(rows)):
        if not math.isnan(value):
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero
            number = text.replace("-", "\N{MINUS SIGN}")
            colour = "white" if shades[y][x][:3] @ (0.299, 0.587, 0.114) < 0.5 else "black"  # by its brightness
            ax.text(x, y, number, ha="center", va="center", fontsize=9, color=colour)
    ax.set_xticks(range(len(column_names)), [_wrapped(name) for name in column_names])
    ax.set_yticks(range(len(row_names)), [_wrapped(name) for name in row_names])
    ax.tick_params(axis="both", length=0, labelsize=9)
    ax.tick_params(axis="x", labelrotation=45)
    for label in ax.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    fonts = [*rcParams["font.family"], *cjk_fonts()]
    for label in ax.get_xticklabels() + ax.get_yticklabels():
        label.set(parse_math=False, fontfamily=fonts)  # a name may have dollar signs
    # lines in the background's colour between the cells
    ax.set_xticks([x + 0.5 for x in range(len(column_names) - 1)], minor=True)
    ax.set_yticks([y + 0.5 for y in range(len(row_names) - 1)], minor=True)
    ax.grid(which="minor", color=ax.get_facecolor(), linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.03)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _read_similarities(similarities: Similarities, tasks: Sequence[str]) -> list[list[float]]:
    """A checked `(tasks, tasks)` copy, NaN where there is no value."""
    count = len(tasks)
    _check_tasks(tasks, count, "The similarities")
    if isinstance(similarities, Mapping):
        similarities = _by_position(similarities, tasks)
    rows = [[_number(value) for value in row] for row in similarities]
    if len(rows) != count or any(len(row) != count for row in rows):
        shape = f"{len(rows)} rows of {sorted({len(row) for row in rows})} entries"
        raise ValueError(
            f"The similarities have {shape} for {count} tasks. Give a square, row the current task and column the "
            "history's, or a mapping by name."
        )
    for t, row in enumerate(rows):
        for j, value in enumerate(row[:t]):
            if not (math.isnan(value) or abs(value) <= 1 + 1e-6):  # rounding
                raise ValueError(
                    f"The similarity of {tasks[t]!r} with {tasks[j]!r} is {value}: a correlation lies in [-1, 1]."
                )
    return rows


def _number(value: Pair) -> float:
    """One number for a pair: the mean of one per layer, NaN where there is none."""
    if isinstance(value, Sequence):
        return math.fsum(value) / len(value) if value else math.nan
    return math.nan if value is None else float(value)


def _by_position(similarities: Mapping[str, Mapping[str, Pair]], tasks: Sequence[str]) -> list[list[Pair]]:
    """The mapping as a square in the order of `tasks`."""
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
        raise ValueError(f"{what}: the name {twice!r} is there twice. Give every task another name.")


def _size(columns: int, rows: int) -> tuple[float, float]:
    """Width and height in inches of one heat map with its names and colour bar."""
    return CELL * max(columns, 3) + MARGINS[0], CELL * max(rows, 3) + MARGINS[1]


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib, which is not installed: pip install "peft-aso[plots]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _wrapped(name: str) -> str:
    """A task's name on at most two lines, the rest cut with an ellipsis."""
    lines = textwrap.wrap(name, LABEL_WIDTH) or [name]
    if len(lines) > 2:
        lines = [lines[0], lines[1][: LABEL_WIDTH - 1].rstrip() + "…"]
    return "\n".join(lines)
