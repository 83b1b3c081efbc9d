"""The benchmark runs every line on a tiny model, where both sides compute the same; and its arithmetic."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
# lines that have one side, or whose sides are two sizes or two rules
NOTHING_TO_COMPARE = ("quadrature", "memory", "probe", "growth.rank", "growth.tokens", "growth.layers")


@pytest.fixture(scope="module")
def speed() -> Iterator[Callable[[str], Any]]:
    """Imports a module of examples/speed by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield lambda name: importlib.import_module(f"speed.{name}")


@pytest.fixture(scope="module")
def results(speed: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a quick run of all lines."""
    out: Path = tmp_path_factory.mktemp("speed") / "speed.json"
    assert speed("benchmark").main(["--quick", "--growth", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_every_line_runs_and_its_sides_compute_the_same(speed: Callable[[str], Any], results: Path) -> None:
    rows = json.loads(results.read_text(encoding="utf-8"))
    names = {row["line"] for row in rows}
    assert names - {"step.hundred.auto", "step.hundred.stacked"} == set(speed("benchmark").LINES) - {"step.hundred"}
    for row in rows:
        values = row["ours"] + row["theirs"]
        assert values and all(math.isfinite(value) and value > 0 for value in values), row
        assert row["sameness"] or row["line"].startswith(NOTHING_TO_COMPARE), row
        assert all(check["difference"] <= check["limit"] for check in row["sameness"]), row
        assert "--quick" in row["command"] and f"torch {version('torch')}" in row["machine"]
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_row_is_replaced_by_the_one_that_measures_the_same(
    speed: Callable[[str], Any], results: Path, tmp_path: Path
) -> None:
    records, out = speed("records"), tmp_path / "speed.json"
    before = records.read(results)
    records.write(out, before, "first")
    again = records.Record(**{**vars(before[1]), "ours": [7.0]})
    other = records.Record(**{**vars(before[1]), "what": "something else"})
    records.write(out, [again, other], "second")
    after = records.read(out)
    assert [each.command for each in after] == ["first", "second", *["first"] * (len(before) - 2), "second"]
    assert after[1].ours == [7.0] and after[2:-1] == [records.Record(**vars(each)) for each in after[2:-1]]


@pytest.mark.parametrize(
    ("bound", "target", "ours", "theirs", "difference", "ratio", "verdict"),
    [
        ("at most", 1.2, [1.0, 9.0, 2.0], [1.0, 2.0, 3.0], 0.0, 1.0, "pass"),  # the median of 1, 4.5 and 2/3
        ("at most", 1.2, [1.0, 2.0, 6.0], [4.0, 1.0], 0.0, 0.8, "pass"),  # 2 against 2.5: not in pairs
        ("at least", 1.2, [4.0], [3.0], 0.0, 0.75, "falls short"),
        ("at least", 1.2, [2.0], [3.0], 0.0, 1.5, "pass"),
        ("at least", 1.2, [2.0], [3.0], 2.0, 1.5, "falls short"),  # faster at something else
        ("at least", 1.2, [2.0], [3.0], math.nan, 1.5, "falls short"),
        ("at most", 1.2, [], [3.0], 0.0, None, "falls short"),
        ("at most", None, [2.0], [3.0], 0.0, 2 / 3, ""),
    ],
)
def test_the_ratio_and_what_passes(
    speed: Callable[[str], Any],
    bound: str,
    target: Any,
    ours: Any,
    theirs: Any,
    difference: float,
    ratio: Any,
    verdict: str,
) -> None:
    records = speed("records")
    checks = [records.Sameness("of", 0.0, 1.0), records.Sameness("of", difference, 1.0)]
    record = records.Record("a", "b", "c", "d", ours, theirs, bound, target, sameness=checks)
    assert record.ratio == (None if ratio is None else pytest.approx(ratio)) and record.verdict == verdict


def test_a_line_that_fails_or_whose_sides_differ_is_an_error(
    speed: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records, benchmark, out = speed("records"), speed("benchmark"), tmp_path / "speed.json"

    def fails(bench: Any) -> Any:
        raise ValueError("no such thing")

    def differs(bench: Any) -> Any:
        return [bench.record("differs", "a", "b", [1.0], [2.0], sameness=[records.Sameness("of", 2.0, 1.0)])]

    def agrees(bench: Any) -> Any:
        return [bench.record("agrees", "a", "b", [1.0], [2.0], sameness=[records.Sameness("of", 1.0, 1.0)])]

    monkeypatch.setattr(benchmark, "LINES", {"fails": fails, "differs": differs, "agrees": agrees})
    arguments = ["--quick", "--device", "cpu", "--out", str(out)]
    assert [benchmark.main([*arguments, "--only", name]) for name in ("fails", "differs", "agrees")] == [1, 1, 0]
    printed = capsys.readouterr().out
    assert (
        "fails [tiny smollm2] failed: ValueError('no such thing')" in printed and "do not compute the same" in printed
    )
    assert [each.line for each in records.read(out)] == ["differs", "agrees"]
    with pytest.raises(SystemExit, match="the lines are fails, differs, agrees"):
        benchmark.main([*arguments, "--only", "agree"])


def test_the_table_has_median_spread_options_and_machine(speed: Callable[[str], Any]) -> None:
    records = speed("records")
    command = "python examples/speed/benchmark.py --model m --only step --repeats 3 --out x.json"
    row = records.Record("step", "m", "a", "b", [3.0, 1.0, 2.0], [0.01], target=3, command=command, machine="here")
    line, machine = records.table([row]).splitlines()[2::2]
    assert (
        line
        == "| `step` | m | a: 2 s (1 to 3, n=3) | b: 10 ms (n=1) | 200 | at most 3 | falls short | --repeats 3 | A |"
    )
    assert machine == "- A: here"


def test_a_difference_is_a_part_of_the_largest_value(speed: Callable[[str], Any]) -> None:
    assert speed("records").relative(torch.tensor([1.0, -4.0]), torch.tensor([2.0, -8.0])) == 0.5


def test_the_page_has_the_table_of_the_recorded_results(speed: Callable[[str], Any]) -> None:
    records, docs = speed("records"), ROOT / "docs"
    found = records.read(docs / "results" / "speed.json")
    assert records.table(found) in (docs / "performance.md").read_text(encoding="utf-8")
