"""AA, FM, FWT and BWT of a run (Eq. 14-17) with bootstrap intervals over test examples, and of a pair of runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from peft_aso.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer

from .results import Correct

WAYS = ("generate", "options", "calibrated")  # of scoring answers, see `evaluation.Answers.correct`
DRAWS = 2000
Matrix = list[list[float]]
Draw = dict[str, numpy.ndarray]  # task name to indices of test examples


def ways_of(stages: Sequence[Correct]) -> list[str]:
    """The ways of scoring that each stage of a run has."""
    kept = [set(ways) for right in stages for ways in right.values()]
    return [way for way in next(iter(stages[0].values())) if all(way in each for each in kept)]


def matrix_of(names: Sequence[str], stages: Sequence[Correct], way: str, draw: Draw | None = None) -> Matrix:
    """The accuracy matrix in percent, NaN where nothing was measured; of the examples drawn, if any."""

    def cell(right: Correct, name: str) -> float:
        return math.nan if name not in right else _mean(right[name][way], name, draw)

    return [[cell(right, name) for name in names] for right in stages]


def alone_of(names: Sequence[str], alone: Correct | None, way: str, draw: Draw | None = None) -> list[float] | None:
    """The accuracy of each task learned alone, in percent; None if one was not learned alone or not scored so."""
    if alone is None or any(way not in alone[name] for name in names):
        return None
    return [_mean(alone[name][way], name, draw) for name in names]


def _mean(answers: Sequence[bool], name: str, draw: Draw | None) -> float:
    values = numpy.asarray(answers, dtype=float)
    return float(100 * (values if draw is None else values[draw[name]]).mean())


def measures(matrix: Matrix, alone: Sequence[float] | None) -> dict[str, float]:
    """The four numbers after the last stage; those that a chain of one task has not are left out."""
    names = ["AA"] if len(matrix) == 1 else ["AA", "FM", "BWT", "FWT"]
    return {name: measure(name, matrix, alone) for name in names if name != "FWT" or alone is not None}


def measure(name: str, matrix: Matrix, alone: Sequence[float] | None) -> float:
    """One of the four numbers after the last stage; FWT needs the tasks learned alone."""
    if name == "FWT":
        assert alone is not None
        return forward_transfer(matrix, alone)
    return {"AA": average_accuracy, "FM": forgetting, "BWT": backward_transfer}[name](matrix)


def all_tested(results: dict[str, Any], after: int) -> bool:
    """Whether all tasks until then were tested after so many: not so within a run with `--tested new`."""
    return set(results["tasks"][:after]) <= set(results["stages"][after - 1]["correct"])


def draws(stages: Sequence[Correct], count: int = DRAWS, seed: int = 0) -> list[Draw]:
    """Test examples drawn with replacement, each task's apart; the same ones for every run on the same tests."""
    sizes = {name: len(next(iter(ways.values()))) for right in stages for name, ways in right.items()}
    generator = numpy.random.default_rng(seed)
    return [{name: generator.integers(sizes[name], size=sizes[name]) for name in sorted(sizes)} for _ in range(count)]


def interval(values: Sequence[float]) -> list[float]:
    """The middle 95%."""
    low, high = numpy.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def summary(names: Sequence[str], stages: Sequence[Correct], alone: Correct | None) -> dict[str, Any]:
    """By way of scoring: the matrix, the tasks alone, the four numbers, and their intervals."""
    found, examples = {}, draws(stages)
    for way in ways_of(stages):
        matrix = matrix_of(names, stages, way)
        reference = alone_of(names, alone, way)
        drawn = [measures(matrix_of(names, stages, way, draw), alone_of(names, alone, way, draw)) for draw in examples]
        numbers = measures(matrix, reference)
        found[way] = {
            "matrix": [[None if math.isnan(value) else value for value in row] for row in matrix],
            "alone": reference,
            **numbers,
            "95%": {name: interval([each[name] for each in drawn]) for name in numbers},
        }
    return found


def difference(
    ours: dict[str, Any], theirs: dict[str, Any], way: str, name: str = "AA", after: int | None = None
) -> tuple[float, list[float]]:
    """How much more of a measure the first of two runs has, and the paired 95% interval of that.

    Args:
        after: as it stood after so many tasks; all of them if left out.

    Raises:
        ValueError: runs with other tasks or other test examples.
    """
    return mean_difference([(ours, theirs)], way, name, after)


def mean_difference(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], way: str, name: str = "AA", after: int | None = None
) -> tuple[float, list[float]]:
    """The mean of `difference` over pairs of runs, such as those of some orders of the same tasks, and its interval.

    The same examples are drawn for all pairs: the interval is that of other test examples, not of other orders.

    Raises:
        ValueError: runs with other tasks or other test examples.
    """
    found, gaps, sizes = [], [], []
    for pair in pairs:
        stages = [[stage["correct"] for stage in each["stages"][:after]] for each in pair]
        sizes += [{task: len(ways[way]) for right in each for task, ways in right.items()} for each in stages]
        measured: list[Callable[[Draw | None], float]] = [
            lambda draw, names=each["tasks"][:after], stages=stages, alone=each["alone"]: measure(  # type: ignore[misc]
                name, matrix_of(names, stages, way, draw), alone_of(names, alone, way, draw)
            )
            for each, stages in zip(pair, stages, strict=True)
        ]
        if any(each != sizes[0] for each in sizes):
            raise ValueError("these runs were not tested on the same examples")
        found.append(measured[0](None) - measured[1](None))
        gaps.append([measured[0](draw) - measured[1](draw) for draw in draws(stages[0])])
    return statistics.mean(found), interval(numpy.mean(gaps, axis=0))


def changes(results: dict[str, Any], way: str) -> dict[tuple[str, str], tuple[float, list[float]]]:
    """By later and earlier task: how much learning the one changed the accuracy on the other, and its 95% interval.

    Only where the earlier task was tested right before and right after.
    """
    stages = results["stages"]
    drawn = draws([stage["correct"] for stage in stages])
    found = {}
    for before, after in itertools.pairwise(stages):
        for name in (each for each in before["correct"] if each in after["correct"]):
            then, now = (numpy.asarray(stage["correct"][name][way], dtype=float) for stage in (before, after))
            gaps = 100 * (now - then)
            found[after["task"], name] = (
                float(gaps.mean()), interval([float(gaps[draw[name]].mean()) for draw in drawn])
            )  # fmt: skip
    return found


def wrong_answers(results: dict[str, Any]) -> dict[str, tuple[float, float, float]] | None:
    """For each task, after the last stage, in percent of its examples: another of its own options was said, an option
    of another task, or neither. None for a run that did not keep what was said."""
    said: dict[str, dict[str, dict[str, int]]] | None = results["stages"][-1].get("said")
    if said is None or set(said) != set(results["tasks"]):
        return None
    found = {}
    for name, rows in said.items():
        others = {option for other, options in said.items() if other != name for option in options}
        counts = [0, 0, 0]
        for right, given in rows.items():
            for text, count in given.items():
                if text != right:
                    counts[0 if text in rows else 1 if text in others else 2] += count
        total = sum(sum(given.values()) for given in rows.values())
        found[name] = (100 * counts[0] / total, 100 * counts[1] / total, 100 * counts[2] / total)
    return found
