"""examples/continual_learning.ipynb: its format, and (slow) all its cells in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tests.examples.conftest import EXAMPLES

NOTEBOOK = EXAMPLES / "continual_learning.ipynb"


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_compiles_and_its_outputs_are_stored_in_order() -> None:
    found = json.loads(NOTEBOOK.read_text())
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5) and NOTEBOOK.stat().st_size < 200_000
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for number, cell in enumerate(code_cells(), start=1):
        compile("".join(cell["source"]), f"cell {number}", "exec")
        assert cell["execution_count"] == number
        assert all(output["output_type"] in ("stream", "display_data") for output in cell["outputs"]), "no error"
    assert "image/png" in json.dumps(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(EXAMPLES)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "data").symlink_to(EXAMPLES / "data")
    monkeypatch.chdir(tmp_path / "examples")  # it writes into ../runs
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(), start=1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["then"] == names["matrix"][1][0], "the loaded chain after its second task is the one of then"
    last = dict(zip(names["names"], names["matrix"][-1], strict=True))
    for each in (names["served"], names["merged"]):
        answers = {task.name: names["accuracy"](each, names["tokenizer"], task) for task in names["tasks"]}
        assert answers == pytest.approx(last, abs=0.05)  # sums in another order may tip a question or two of 40
    assert sum(last.values()) / 4 > 0.5 and (tmp_path / "runs" / "notebook" / "chain" / "chain.json").is_file()
