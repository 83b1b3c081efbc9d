"""Measures, tables, the compressed file of results and figures, on runs made by hand; and the page of results."""

from __future__ import annotations

import copy
import json
import lzma
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE, PACKED = ROOT / "docs" / "results.md", ROOT / "docs" / "results" / "continual.jsonl.xz"
# "1.5 (1.41 to 1.64)", "43% (25 to 82%)", "-0.25 (p 0.33)"
NUMBERS = re.compile(r"[+-]?\d[\d.]*%? \((?:[+-]?\d[\d.]*%? to [+-]?\d[\d.]*%?|p [\d.]+)\)")


def record(benchmark: Any, method: str, second: tuple[str, str], **settings: Any) -> dict[str, Any]:
    """A run on tasks a and b of four and two questions, answered as given after the second task."""
    kind = benchmark("methods").METHODS[method]
    chosen = benchmark("settings").Settings(method=method, order="a,b", precision="float32", **settings).recorded()
    soft = method == "aso_lora"
    ways = [dict.fromkeys(("generate", "options", "calibrated"), each) for each in ("1110", *second)]
    log = {"loss": [1.5, 0.123456], **({"psi/a": [0.0, 0.75], "similarity/a": [1.0, 0.25]} if soft else {})}
    return {
        "title": kind.title, "tasks": ["a", "b"], "settings": chosen,
        "stages": [
            {"task": "a", "correct": {"a": ways[0]}, "log": {"loss": [2.0, 1.0]}},
            {"task": "b", "correct": {"a": ways[1], "b": ways[2]}, "log": log,
             "similarity": {"a": 0.25} if soft else {}},
        ],
        "alone": {"a": dict(ways[0], generate="1111"), "b": dict(ways[2], generate="10")},
    }  # fmt: skip


@pytest.fixture
def runs(benchmark: Any, tmp_path: Path) -> Path:
    """A folder with a run without a penalty, a soft and a hard one, another seed, and one that is not finished."""
    found = {
        "inc": record(benchmark, "inc_lora", ("1000", "11")),
        "inc-1": record(benchmark, "inc_lora", ("1100", "11"), seed=1),
        "soft": record(benchmark, "aso_lora", ("1100", "11"), penalty_weight=0.5),
        "hard": record(benchmark, "aso_lora", ("1000", "10"), penalty_weight=0.5, similarity="none"),
        "stopped": record(benchmark, "seq_lora", ("1000", "10")),
    }
    found["stopped"]["stages"].pop()
    for name, each in found.items():
        (tmp_path / "group" / name).mkdir(parents=True)
        (tmp_path / "group" / name / "results.json").write_text(json.dumps(each))
    return tmp_path / "group"


def rows(benchmark: Any, *arguments: Any) -> list[list[str]]:
    module = benchmark("table")
    found: list[list[str]] = module.table(module.parse([str(each) for each in arguments]))
    return found


def test_measures_and_intervals_by_hand(benchmark: Any) -> None:
    scores = benchmark("scores")
    run = record(benchmark, "inc_lora", ("1000", "11"))
    matrix, alone = scores.matrices(run, "generate", 0)
    assert matrix[0, 0, 0] == 75 and matrix[0, 0, 1] != matrix[0, 0, 1] and matrix[0, 1].tolist() == [25, 100]
    assert alone.tolist() == [[100, 50]]
    values = {name: scores.measured(run, "generate", name) for name in scores.MEASURES}
    assert {name: value[0] for name, value in values.items()} == {"AA": 62.5, "FM": 50, "BWT": -50, "FWT": 50}
    # of a's four questions one is right, b's two are both: AA of a sample is 50 + its share of a / 2
    counts = {50 + 12.5 * right: 0 for right in range(5)}
    for value in values["AA"][1:]:
        counts[value] += 1
    for right, chance in enumerate((0.316, 0.422, 0.211, 0.047, 0.004)):  # binomial, n = 4, p = 1/4
        assert counts[50 + 12.5 * right] / 2000 == pytest.approx(chance, abs=0.04)
    other = record(benchmark, "aso_lora", ("1100", "11"))
    gap = scores.difference([(other, run), (run, run)], "generate")
    assert gap[0] == 6.25 and gap[1:].min() >= 0, "paired, and the mean over pairs"
    assert scores.difference([(run, run)], "generate", "FM")[1:].any() == False  # noqa: E712
    fewer = copy.deepcopy(other)
    fewer["stages"][1]["correct"]["b"]["generate"] = "111"
    fewer["alone"] = None
    assert scores.difference([(fewer, run)], "generate") is None, "not the same questions"
    assert scores.measured(fewer, "generate", "FWT") is None


def test_tables_of_hand_made_runs(benchmark: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = "ASO-LoRA (lambda 0.5)", "ASO-LoRA (lambda 0.5, similarity none)"
    assert rows(benchmark, runs) == [
        ["", "a-b", "Avg."], [hard, "37.5", "37.5"], ["IncLoRA", "68.8 ± 8.8", "68.8"], [soft, "75.0", "75.0"],
    ]  # fmt: skip
    assert rows(benchmark, runs, "--shape", "tasks", "--only", "*/soft")[1] == [soft, "50.0", "100.0"]
    measures = {row[0]: row for row in rows(benchmark, runs, "--shape", "measures")}
    assert list(measures) == ["run", "group/hard", "group/inc", "group/inc-1", "group/soft"], "finished ones"
    assert [cell.split(" ")[0] for cell in measures["group/soft"][4:]] == ["75.0", "25.0", "-25.0", "50.0"]
    against = rows(benchmark, runs, "--against", "inc_lora")
    assert [row[:3] for row in against[1:]] == [[f"{x} to IncLoRA", "a first", "0"] for x in (hard, soft)]
    assert against[1][3].startswith("-25.0 (") and against[2][3].startswith("+12.5 (")
    assert rows(benchmark, runs, "--against", "group/hard", "--measure", "FM")[-1][3].startswith("-25.0 (")
    with pytest.raises(SystemExit, match="no run of it"):
        rows(benchmark, runs, "--against", "osf")
    penalties = rows(benchmark, runs, "--shape", "penalties")
    assert [row[:5] for row in penalties[1:]] == [
        ["default", "test", "hard, squared, lambda 0.5", "a first", "37.5"],
        ["default", "test", "soft, squared, lambda 0.5", "a first", "75.0"],
    ]
    assert penalties[2][5].startswith("+12.5 (") and penalties[2][7].startswith("+37.5 (") and not penalties[1][7]
    preferences = rows(benchmark, runs, "--shape", "preferences")
    assert [row[-1] for row in preferences[1:]] == ["0%"] * 4 + ["median 0% (0 to 0%)"]
    pairs = rows(benchmark, runs, "--shape", "pairs")
    assert pairs[1:] == [[hard, "b", "a", "0.25", "-50.0"], [soft, "b", "a", "0.25", "-25.0"]]
    benchmark("table").main([str(runs), "--only", "group/soft"])
    assert capsys.readouterr().out == f"|  | a-b | Avg. |\n|---|---|---|\n| {soft} | 75.0 | 75.0 |\n"
    longer = record(benchmark, "inc_lora", ("1000", "11"), epochs=2.0)
    (runs / "longer").mkdir()
    (runs / "longer" / "results.json").write_text(json.dumps(longer))
    with pytest.raises(SystemExit, match="differ in epochs"):
        rows(benchmark, runs)


def test_the_compressed_file_holds_what_the_folders_hold(benchmark: Any, runs: Path, tmp_path: Path) -> None:
    module, file = benchmark("records"), tmp_path / "packed.jsonl.xz"
    assert len(module.add_records(file, [runs])) == 4
    with lzma.open(file, "rt") as packed:
        names = [json.loads(line)["name"] for line in packed]
    assert names == ["group/hard", "group/inc", "group/inc-1", "group/soft"]
    before, after = ({each["name"]: each for each in module.read_records([path])} for path in (runs, file))
    for run in before.values():
        run["stages"][1]["log"]["loss"][1] = 0.1235  # four digits
    assert before == after
    assert rows(benchmark, file, "--shape", "measures") == rows(benchmark, runs, "--shape", "measures")
    changed = record(benchmark, "inc_lora", ("1111", "11"))
    (runs / "inc" / "results.json").write_text(json.dumps(changed))
    assert len(module.add_records(file, [runs / "inc"])) == 4, "the run of that name is replaced"
    (found,) = module.read_records([file], ["*/inc"])
    assert found["stages"][1]["correct"] == changed["stages"][1]["correct"]
    with pytest.raises(SystemExit, match="No finished run"):
        module.read_records([file], ["other/*"])


def test_figures(benchmark: Any, runs: Path, tmp_path: Path) -> None:
    module = benchmark("figures")
    files = module.draw(module.parse([str(runs), "--out", str(tmp_path)]))
    assert [file.name for file in files] == ["average_accuracy.png", "psi.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    files = module.draw(module.parse([str(runs), "--out", str(tmp_path), "--only", "*/inc"]))
    assert [file.name for file in files] == ["average_accuracy.png"], "no psi without a similarity"


def test_the_page_of_results_has_the_numbers_that_its_commands_print(benchmark: Any) -> None:
    """Each row of its tables is printed by one of its commands, and each number with an interval or a p, too."""
    module, script = (
        benchmark("table"),
        "python examples/continual_benchmark/table.py docs/results/continual.jsonl.xz ",
    )
    lines = PAGE.read_text(encoding="utf-8").replace("\\\n", " ").replace("$T ", script).splitlines()
    printed: list[str] = []
    for line in lines:
        if line.startswith(script):
            options = module.parse([str(PACKED), *shlex.split(line.removeprefix(script), comments=True)])
            printed += module.markdown(module.table(options)).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    numbers = set(NUMBERS.findall(" ".join(lines)))
    assert len(rows) > 10 and len(numbers) > 60 and set(rows) <= set(printed)
    assert numbers <= set(NUMBERS.findall("\n".join(printed)))
