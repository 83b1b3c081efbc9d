"""The benchmark runs every line on tiny models, and both sides of each compute the same thing there.

Times are not looked at: on a model of this size they say nothing, and on a shared machine they vary.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
FIELDS = {
    "line": str,
    "model": str,
    "what": str,
    "against": str,
    "ours": list,
    "theirs": list,
    "unit": str,
    "sameness": list,
    "notes": dict,
}
# lines whose two sides are runs of the same thing at two sizes, or that have one side only
NOTHING_TO_COMPARE = ("attribution.operations", "quadrature", "folding", "memory", "probe", "growth")


@pytest.fixture(scope="module")
def command() -> Iterator[Any]:
    """The module behind `examples/speed/benchmark.py`, imported as that file does it."""
    sys.path.insert(0, str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module("speed.command")
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("speed", "tasks"):
            del sys.modules[name]


def run(command: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of a quick run, which has to end well."""
    out = folder / "speed.json"
    assert command.main(["--quick", "--device", "cpu", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def check(result: dict[str, Any]) -> None:
    """The shape of the JSON, that ratios follow from the values, and that all sides agree."""
    assert result["failures"] == []
    assert {"processor", "threads", "versions"} <= set(result["machine"])
    for record in result["records"]:
        name = record["line"]
        assert {field: type(record[field]) for field in FIELDS} == FIELDS, name
        values = record["ours"] + record["theirs"]
        assert values and all(math.isfinite(value) and value > 0 for value in values), name
        assert all(sameness["same"] for sameness in record["sameness"]), (name, record["sameness"])
        assert record["sameness"] or name.startswith(NOTHING_TO_COMPARE), f"{name} compares nothing"
        assert (record["passed"] is None) == (record["target"] is None), name


def names(result: dict[str, Any]) -> set[str]:
    return {record["line"] for record in result["records"]}


def test_every_line_runs_on_a_tiny_llama(command: Any, tmp_path: Path) -> None:
    result = run(command, tmp_path, "--model", "smollm2", "--growth")
    check(result)
    run_ones = {line.name for line in command.LINES if "causal" in line.kinds}
    assert all(any(found == name or found.startswith(f"{name}.") for found in names(result)) for name in run_ones)
    pictures = {path.name for path in (tmp_path / "speed").iterdir()}
    topics = ("quadrature", "path", "probe_size")
    assert {f"{name}.{kind}" for name in topics for kind in ("csv", "png", "svg")} <= pictures


def test_every_line_of_an_encoder_decoder_runs_on_a_tiny_t5_and_bert(command: Any, tmp_path: Path) -> None:
    """All but memory, which starts two processes and is the same for all models, and similarity, which has none."""
    lines = [line.name for line in command.LINES if line.name not in ("memory", "similarity", "growth.tokens")]
    result = run(command, tmp_path, "--model", "t5,bert", "--only", ",".join(lines))
    check(result)
    models = {record["model"] for record in result["records"] if record["line"] == "attribution.encoder"}
    assert models == {"tiny t5", "tiny bert"}
    assert {"step.two", "penalty.loop", "chain.load", "task.stored"} <= names(result)


def test_a_line_that_fails_is_said_and_the_others_run(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Any) -> list[Any]:
        raise RuntimeError("out of order")

    lines = tuple(line for line in command.LINES if line.name in ("penalty.step", "chain.merge"))
    broken_line = command.Line(lines[0].name, broken, lines[0].kinds)
    monkeypatch.setattr(command, "LINES", (broken_line, lines[1]))
    out = tmp_path / "speed.json"
    assert command.main(["--quick", "--device", "cpu", "--model", "smollm2", "--out", str(out)]) == 1
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [failure["line"] for failure in result["failures"]] == ["penalty.step"]
    assert "out of order" in result["failures"][0]["error"]
    assert names(result) == {"chain.merge"}


def test_a_line_that_is_not_known_is_refused(command: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no line speed; there are step.two"):
        command.main(["--quick", "--device", "cpu", "--only", "speed", "--out", str(tmp_path / "speed.json")])


@pytest.mark.parametrize(
    ("bound", "ours", "theirs", "difference", "ratio", "passed"),
    [
        ("at most", [1.0, 9.0, 2.0], [1.0, 2.0, 3.0], 0.0, 1.0, True),
        ("at most", [3.0], [2.0], 0.0, 1.5, False),
        ("at least", [2.0], [3.0], 0.0, 1.5, True),
        ("at least", [4.0], [3.0], 0.0, 0.75, False),
        ("at least", [2.0], [3.0], 2.0, 1.5, False),  # twice as fast at something else
        ("at least", [2.0], [3.0], math.nan, 1.5, False),
        ("at most", [], [3.0], 0.0, None, False),
    ],
)
def test_a_line_passes_when_it_meets_its_target_and_both_sides_agree(
    command: Any,
    bound: str,
    ours: list[float],
    theirs: list[float],
    difference: float,
    ratio: float | None,
    passed: bool,
) -> None:
    records = importlib.import_module("speed.records")
    checks = [records.Sameness("of", 0.0, 1.0), records.Sameness("of", difference, 1.0)]
    target = 1.2
    record = records.Record("a", "b", "c", "d", ours, theirs, bound, target, sameness=checks)
    assert record.ratio == ratio
    assert record.passed is passed
    shown = records.table([record])
    assert ("pass" if passed else "falls short") in shown


def test_the_peer_of_the_penalty_is_the_loop_over_names(command: Any, fresh_seed: int) -> None:
    """Two modules, by hand: what the loop finds is the sum of absolute products of each module's own pair."""
    penalty = importlib.import_module("speed.penalty")
    model = torch.nn.ModuleDict()
    total = 0.0
    for name in ("q", "v"):
        old, new = torch.randn(6, 5), torch.randn(2, 5)
        pair = {"lora_A": penalty._named(old, False), "loranew_A": penalty._named(new, True)}
        model[name] = torch.nn.ModuleDict(pair)
        total += (old @ new.T).abs().sum().item()
    assert penalty.olora_loop(model).item() == pytest.approx(total, rel=1e-5)


def test_layers_that_captum_is_timed_on_are_evenly_spread(command: Any) -> None:
    peer = importlib.import_module("speed.captum_peer")
    layers: Any = list(range(30))
    assert peer.spread_layers(layers, 5) == [0, 7, 14, 22, 29]
    assert peer.spread_layers(layers, None) == layers
    assert peer.spread_layers(layers, 1) == [15]
    assert peer.spread_layers(layers[:3], 5) == [0, 1, 2]
