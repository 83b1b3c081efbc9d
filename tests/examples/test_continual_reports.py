"""Tables, figures and intervals of the continual benchmark, and where forgetting comes from."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from peft_aso import AttributionConfig, update_coefficients
from tests.examples.tiny_tasks import TASKS, settings_of


@pytest.fixture(scope="module")
def finished(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: three methods, and one of them with a second seed."""
    out = tmp_path_factory.mktemp("finished")
    for method, seed in (("aso_lora", 0), ("inc_lora", 0), ("inc_lora", 1), ("o_lora", 0)):
        changes = {"method": method, "seed": seed, "granularity": "layer", "refresh": 0.5}
        benchmark("chain").run(settings_of(benchmark, data, saved["llama"], out, **changes))
    return out


def results_of(finished: Path, method: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(next(finished.glob(f"{method}*seed0/results.json")).read_text())
    return results


def rows(benchmark: Any, folder: Path, *more: str) -> list[list[str]]:
    """The cells of a table in Markdown, its second line left out."""
    module = benchmark("table")
    lines = module.table(module.parse([str(folder), *more])).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_tables_have_the_papers_shape(benchmark: Any, finished: Path) -> None:
    found = rows(benchmark, finished)
    assert found[0] == ["by --way generate", "colors-signs", "Avg."]
    assert [row[0] for row in found[1:]] == ["ASO-LoRA", "IncLoRA", "O-LoRA"]
    results = [json.loads(path.read_text()) for path in sorted(finished.glob("inc_lora*/results.json"))]
    values = [each["summary"]["generate"]["AA"] for each in results]
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert found[2][1] == f"{sum(values) / 2:.1f} ± {deviation:.1f}"
    assert rows(benchmark, finished, "--shape", "tasks", "--way", "options")[0][1:] == ["colors", "signs"]
    last = results[0]["summary"]["generate"]["matrix"][-1]
    assert rows(benchmark, finished, "--shape", "measures")[2][3].startswith(f"{sum(last) / 2:.1f} (")
    against = rows(benchmark, finished, "--against", "inc_lora")
    assert {(row[0], row[2]) for row in against[1:]} == {("ASO-LoRA", "0"), ("O-LoRA", "0")}
    module = benchmark("table")
    assert module.table(module.parse([str(finished), "--latex"])).startswith(r"\begin{tabular}{lcc}")
    assert "ASO-LoRA, t5-large in the paper" in module.table(module.parse([str(finished), "--paper", "t5-large"]))
    with pytest.raises(SystemExit, match="no run of it"):
        rows(benchmark, finished, "--against", "osf")


def test_figures_with_the_numbers_behind_them(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    module = benchmark("figures")
    files = module.draw(module.parse([str(finished), "--out", str(tmp_path)]))
    topics = {path.stem.removesuffix("_colors-signs") for path in files}
    assert topics == {
        "average_accuracy", "forgetting", "forward_transfer", "loss", "similarity", "psi", "psi_by_step",
        "psi_by_layer", "outputs", "penalties",
    }  # fmt: skip
    assert {path.suffix for path in files} == {".png", ".svg", ".csv"} and len(files) == 3 * len(topics)
    assert all(path.stat().st_size > 0 for path in files)
    with (tmp_path / "average_accuracy_colors-signs.csv").open(encoding="utf-8", newline="") as file:
        drawn = [float(row["AA"]) for row in csv.DictReader(file) if row["run"].startswith("ASO")]
    matrix = results_of(finished, "aso_lora")["summary"]["generate"]["matrix"]
    assert drawn == pytest.approx([matrix[0][0], sum(matrix[1]) / 2])


def test_where_forgetting_comes_from(benchmark: Any, finished: Path) -> None:
    why, run = benchmark("why"), next(finished.glob("inc_lora*seed0"))
    found = why.main(why.parse([str(run)]))
    assert json.loads((run / "why.json").read_text()) == found
    (pair,) = found["geometry"]
    assert (pair["later"], pair["earlier"]) == ("signs", "colors") and 0 <= pair["rows of A shared"] <= 1
    untouched, summary = found["taken out"][0], json.loads((run / "results.json").read_text())["summary"]
    assert [untouched[name] for name in TASKS] == pytest.approx(summary["generate"]["matrix"][-1])
    for way in ("generate", "options", "calibrated"):
        assert untouched[f"AA, {way}"] == pytest.approx(summary[way]["AA"])
        assert untouched[f"change of FM, {way}"] == [0, 0, 0]


def test_psi_of_each_reading_is_that_of_the_package(benchmark: Any, finished: Path, saved: dict[str, Path]) -> None:
    module, run = benchmark("psi"), next(finished.glob("aso_lora*seed0"))
    found = module.main(module.parse([str(run), "--examples", "3"]))
    assert len({row["signs to colors"] for row in found}) > 12, "readings differ"
    opened = benchmark("finished").open_run(run)
    batches = opened.method.few_batches(dataclasses.replace(opened.tasks[1], train=opened.tasks[1].train[:3]))
    for row in found[::5]:
        reading = {name: value for name, value in row.items() if " " not in name}
        opened.model.peft_config["signs"].attribution = AttributionConfig(**reading)
        psi = update_coefficients(opened.model, batches).soft_coefficients
        assert psi == {"colors": pytest.approx(row["signs to colors"], abs=1e-5)}, reading


def test_penalties_against_none(benchmark: Any, finished: Path) -> None:
    found = {row[0]: row[3:] for row in rows(benchmark, finished, "--shape", "penalties")[1:]}
    soft, none = (results_of(finished, name) for name in ("aso_lora", "inc_lora"))
    value, (low, high) = benchmark("scores").mean_difference([(soft, none)], "generate")
    assert found["ASO-LoRA"][2] == f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
