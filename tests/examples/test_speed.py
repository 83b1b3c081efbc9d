"""The benchmark runs every line on tiny models, and both sides of each compute the same thing there. Times of models
of this size tell nothing and are not looked at."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

# lines whose two sides are runs of the same thing at two sizes, or that have one side only
NOTHING_TO_COMPARE = ("attribution.operations", "quadrature", "folding", "memory", "probe", "growth")


@pytest.fixture(scope="module")
def command(benchmark: Any) -> Any:
    """The module behind `examples/speed/benchmark.py`."""
    return importlib.import_module("speed.command")


def run(command: Any, out: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """The JSON of a quick run; ratios follow from the values, and all sides agree."""
    assert command.main(["--quick", "--device", "cpu", "--out", str(out), *arguments]) == status
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert {"processor", "threads", "versions"} <= set(result["machine"])
    for record in result["records"]:
        name, values = record["line"], record["ours"] + record["theirs"]
        assert values and all(math.isfinite(value) and value > 0 for value in values), name
        assert all(sameness["same"] for sameness in record["sameness"]), (name, record["sameness"])
        assert record["sameness"] or name.startswith(NOTHING_TO_COMPARE), f"{name} compares nothing"
        assert (record["passed"] is None) == (record["target"] is None), name
    return result


def test_every_line_runs_on_a_tiny_llama(command: Any, tmp_path: Path) -> None:
    result = run(command, tmp_path / "speed.json", "--model", "smollm2", "--growth")
    names = [record["line"] for record in result["records"]]
    wanted = {line.name for line in command.LINES if "causal" in line.kinds}
    assert result["failures"] == []
    assert all(any(found == name or found.startswith(f"{name}.") for found in names) for name in wanted)
    pictures = {path.name for path in (tmp_path / "speed").iterdir()}
    topics = ("quadrature", "path", "probe_size")
    assert {f"{name}.{kind}" for name in topics for kind in ("csv", "png", "svg")} <= pictures


def test_every_line_of_an_encoder_decoder_runs_on_a_tiny_t5_and_bert(command: Any, tmp_path: Path) -> None:
    """All but memory, which starts two processes and is the same for all models, and similarity, which has none."""
    lines = [line.name for line in command.LINES if line.name not in ("memory", "similarity", "growth.tokens")]
    result = run(command, tmp_path / "speed.json", "--model", "t5,bert", "--only", ",".join(lines))
    models = {record["model"] for record in result["records"] if record["line"] == "attribution.encoder"}
    assert result["failures"] == [] and models == {"tiny t5", "tiny bert"}
    names = {record["line"] for record in result["records"]}
    assert {"step.two", "penalty.loop", "chain.load", "task.stored"} <= names


@pytest.mark.parametrize(
    ("bound", "ours", "theirs", "difference", "ratio", "passed"),
    [
        ("at most", [1.0, 9.0, 2.0], [1.0, 2.0, 3.0], 0.0, 1.0, True),
        ("at least", [4.0], [3.0], 0.0, 0.75, False),
        ("at least", [2.0], [3.0], 2.0, 1.5, False),  # twice as fast at something else
        ("at most", [], [3.0], 0.0, None, False),
    ],
)
def test_a_line_passes_when_it_meets_its_target_and_both_sides_agree(
    command: Any, bound: str, ours: list[float], theirs: list[float], difference: float, ratio: Any, passed: bool
) -> None:
    records = importlib.import_module("speed.records")
    checks = [records.Sameness("of", 0.0, 1.0), records.Sameness("of", difference, 1.0)]
    record = records.Record("a", "b", "c", "d", ours, theirs, bound, 1.2, sameness=checks)
    assert record.ratio == ratio and record.passed is passed
    assert ("pass" if passed else "falls short") in records.table([record])
