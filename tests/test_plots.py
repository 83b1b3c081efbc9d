"""The pictures: a complete file, the given numbers in their cells, clear refusals."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from peft_aso.plots import plot_accuracy, plot_overview, plot_similarity

TASKS = ["dbpedia", "amazon", "agnews"]
MATRIX = [[92, None, None], [80.25, 37, None], [73, 40, 0.4]]
SQUARE = [[1, 9, 9], [0.57, 1, 9], [-0.4, math.nan, 1]]
NAMED = {"amazon": {"dbpedia": 0.57}, "agnews": {"dbpedia": -0.4}}
BY_LAYER = {task: {old: [value - 0.1, value + 0.1] for old, value in row.items()} for task, row in NAMED.items()}


def cells(ax: Axes) -> dict[tuple[int, int], str]:
    """The text in each cell, by (row, column)."""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in ax.texts}


def names(ax: Axes) -> tuple[list[str], list[str]]:
    """The labels of rows and columns."""
    return [t.get_text() for t in ax.get_yticklabels()], [t.get_text() for t in ax.get_xticklabels()]


def test_accuracy_has_one_number_per_measured_cell() -> None:
    ax = plot_accuracy(MATRIX, TASKS)
    expected = {(0, 0): "92.0", (1, 0): "80.2", (1, 1): "37.0", (2, 0): "73.0", (2, 1): "40.0", (2, 2): "0.4"}
    assert cells(ax) == expected and names(ax) == (TASKS, TASKS)
    blank = np.ma.getmaskarray(ax.images[0].get_array()).tolist()
    assert blank == [[False, True, True], [False, False, True], [False] * 3]
    fractions = plot_accuracy([[0.925, None], [1.0, 0.0]], TASKS[:2])
    assert cells(fractions) == {(0, 0): "92.5", (1, 0): "100.0", (1, 1): "0.0"}
    in_progress = plot_accuracy(MATRIX[:2], TASKS)
    assert names(in_progress) == (TASKS[:2], TASKS) and len(in_progress.texts) == 3
    (label,), _ = names(plot_accuracy([[1]], ["natural questions about the weather in spring and in autumn"]))
    assert label == "natural questions\nabout the weather…"


@pytest.mark.parametrize("similarities", [SQUARE, NAMED, np.array(SQUARE, dtype=np.float32), BY_LAYER])
def test_similarity_shows_current_tasks_against_their_history(similarities: object) -> None:
    ax = plot_similarity(similarities, TASKS)
    assert cells(ax) == {(0, 0): "0.57", (1, 0): "\N{MINUS SIGN}0.40"}
    assert names(ax) == (TASKS[1:], TASKS[:-1])
    assert ax.images[0].get_clim() == (-1, 1)


def test_numbers_can_be_read() -> None:
    ax = plot_similarity({"amazon": {"dbpedia": -0.001}}, TASKS[:2])
    assert cells(ax) == {(0, 0): "0.00"}, "no minus before a zero"
    ax = plot_accuracy([[0, None], [0, 100]], TASKS[:2])
    assert [text.get_color() for text in ax.texts] == ["white", "white", "black"]
    ax = plot_similarity({"amazon": {"dbpedia": -1}, "agnews": {"dbpedia": 0, "amazon": 1}}, TASKS)
    assert [text.get_color() for text in ax.texts] == ["white", "black", "white"]


def test_given_axes_are_drawn_on_and_the_callers_matplotlib_is_left_alone() -> None:
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend(), dict(matplotlib.rcParams), plt.get_fignums()
    one, two = Figure().subplots(1, 2)
    assert plot_accuracy(MATRIX, TASKS, ax=one) is one and plot_similarity(NAMED, TASKS, ax=two) is two
    assert len(one.texts) == 6 and len(two.texts) == 2
    plot_accuracy(MATRIX, TASKS)
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams), plt.get_fignums()) == before


@pytest.mark.parametrize("count", [1, 2, 15])
def test_an_overview_is_a_readable_picture(tmp_path: Path, count: int) -> None:
    tasks = [f"task with a rather long name, number {index}" for index in range(count)]
    matrix = [[50 if i <= t else None for i in range(count)] for t in range(count)]
    path = tmp_path / "new" / "folder" / "a.png"
    assert plot_overview(matrix, np.full((count, count), 0.5), tasks, path) == path
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as picture:
        width, height = picture.size
        colours = picture.convert("RGB").getcolors(maxcolors=width * height)
    assert width > height > 300 and len(colours) > 20
    path = plot_overview(matrix, np.full((count, count), 0.5), tasks, str(tmp_path / "chain.svg"))
    assert xml.etree.ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("name", ["$a$", "$unclosed", "{", "100 %", "", "très_long" * 9, "任务"])
def test_odd_names_are_drawn_as_they_are(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    assert plot_overview([[1, None], [1, 1]], {name: {"a": 0.1}}, ["a", name], tmp_path / "a.png").exists()
    assert all("Glyph" in str(warning.message) for warning in recwarn)  # the font may lack a script


def test_chinese_names_take_an_installed_font_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A font that has one square for each character of the name, installed for this test."""
    name, pen = "任务", TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 800), (800, 800), (800, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in name})
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupNameTable({"familyName": "Test Sans CJK SC", "styleName": "Regular"})
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    ax = plot_accuracy([[1, None], [1, 1]], ["mood", name])
    label = ax.get_yticklabels()[1]
    ax.figure.savefig(tmp_path / "a.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert "Test Sans CJK SC" in label.get_fontfamily() and label.get_text() == name


def test_a_picture_that_cannot_be_drawn_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"End the path in \.png or \.svg"):
        plot_overview(MATRIX, NAMED, TASKS, tmp_path / "folder" / "a.pdf")
    path = plot_overview(MATRIX, NAMED, TASKS, tmp_path / "a.png")
    before = path.read_bytes()

    def fail(self: Figure, target: BinaryIO, **kwargs: object) -> None:
        target.write(b"half a pict")
        raise ValueError("no such font")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(ValueError, match="no such font"):
        plot_overview(MATRIX, NAMED, TASKS, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("draw", "numbers", "tasks", "message"),
    [
        (plot_similarity, SQUARE[:2], TASKS, r"2 rows of \[3\] entries for 3 tasks"),
        (plot_similarity, [[1, 2], [3, 4], [5, 6]], TASKS, r"3 rows of \[2\] entries for 3 tasks"),
        (plot_similarity, [], TASKS, r"0 rows of \[\] entries"),
        (plot_similarity, {"yahoo": {"dbpedia": 0.1}}, TASKS, "name 'yahoo', none of the tasks"),
        (plot_similarity, {"amazon": {"yahoo": 0.1}}, TASKS, "name 'yahoo', none of the tasks"),
        (plot_similarity, {"dbpedia": {"amazon": 0.1}}, TASKS, "'amazon' cannot be history of 'dbpedia'"),
        (plot_similarity, {"amazon": {"amazon": 1.0}}, TASKS, "'amazon' cannot be history of 'amazon'"),
        (plot_similarity, {"amazon": {"dbpedia": 1.5}}, TASKS, "similarity of 'amazon' with 'dbpedia' is 1.5"),
        (plot_similarity, {"amazon": {"dbpedia": math.inf}}, TASKS, "similarity of 'amazon' with 'dbpedia' is inf"),
        (plot_accuracy, MATRIX, TASKS[:2], "2 names for 3 tasks"),
        (plot_accuracy, MATRIX, "abc", "'abc' for 3 tasks"),
        (plot_accuracy, MATRIX, ["a", "b", "a"], "'a' is there twice"),
    ],
)
def test_bad_numbers_and_names_are_refused(draw: Any, numbers: object, tasks: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(numbers, tasks)


def test_without_matplotlib_the_module_is_imported_and_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import peft_aso.plots as p; p.plot_accuracy([[1]], ['a'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert 'matplotlib, which is not installed: pip install "peft-aso[plots]"' in done.stderr
