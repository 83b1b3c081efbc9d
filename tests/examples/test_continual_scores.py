"""The four numbers, their intervals, and what wrong answers are, by hand."""

from __future__ import annotations

from typing import Any

import pytest


def test_metrics_and_intervals_by_hand(benchmark: Any) -> None:
    scores = benchmark("scores")
    stages = [
        {"a": {"generate": [True, True, True, False]}},
        {"a": {"generate": [True, False, False, False]}, "b": {"generate": [True, True]}},
    ]
    alone = {"a": {"generate": [True] * 4}, "b": {"generate": [True, False]}}
    found = scores.summary(["a", "b"], stages, alone)["generate"]
    assert found["matrix"] == [[75.0, None], [25.0, 100.0]] and found["alone"] == [100.0, 50.0]
    assert (found["AA"], found["FM"], found["BWT"], found["FWT"]) == (62.5, 50.0, -50.0, 50.0)
    low, high = found["95%"]["AA"]
    assert 50 <= low < 62.5 < high <= 100
    run = {"tasks": ["a", "b"], "stages": [{"correct": each} for each in stages], "alone": alone}
    assert scores.difference(run, run, "generate") == (0.0, [0.0, 0.0])
    other = {**run, "stages": [{"correct": {"a": {"generate": [True, True, False, False]}}}, {"correct": stages[1]}]}
    assert scores.difference(run, other, "generate", after=1)[0] == 25.0
    assert scores.difference(run, other, "generate", "FM")[0] == 25.0
    better = [stages[0], {**stages[1], "a": {"generate": [True, True, False, False]}}]
    gap, (low, high) = scores.difference({**run, "stages": [{"correct": e} for e in better]}, run, "generate")
    assert gap == 12.5 and 0 <= low < 12.5 < high
    pair = {**run, "stages": [{"correct": e} for e in better]}, run
    mean, (low, high) = scores.mean_difference([pair, (run, run)], "generate")
    assert mean == 6.25 and [low, high] == [each / 2 for each in scores.difference(*pair, "generate")[1]]
    with pytest.raises(ValueError, match="not tested on the same examples"):
        scores.mean_difference([(run, run), (other, {**run, "stages": run["stages"][:1]})], "generate")


def test_a_score_that_earlier_runs_did_not_have_is_left_out_alone(benchmark: Any) -> None:
    scores = benchmark("scores")
    old, new = {"generate": [True, False]}, {"generate": [True, False], "calibrated": [True, True]}
    stages = [{"a": new}, {"a": new, "b": new}]
    found = scores.summary(["a", "b"], stages, {"a": old, "b": old})  # FWT needs it of the tasks alone
    assert "FWT" in found["generate"] and "FWT" not in found["calibrated"] and found["calibrated"]["alone"] is None
    assert found["calibrated"]["AA"] == 100
    assert set(scores.summary(["a", "b"], [{"a": old}, {"a": new, "b": new}], None)) == {"generate"}


def test_what_wrong_answers_are(benchmark: Any) -> None:
    scores = benchmark("scores")
    said = {
        "a": {"x": {"x": 5, "y": 1, "p": 2}, "y": {"y": 1, "?": 1}, "z": {}},
        "b": {"p": {"p": 2, "z": 1}, "x": {"p": 1}},
    }
    found = scores.wrong_answers({"tasks": ["a", "b"], "stages": [{}, {"said": said}]})
    assert found == {"a": (10.0, 20.0, 10.0), "b": (25.0, 25.0, 0.0)}
    assert scores.wrong_answers({"tasks": ["a"], "stages": [{}]}) is None  # a model a task keeps no answers
