"""AA, FM, BWT and FWT of a run with bootstrap intervals over test questions, and differences of runs in pairs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy

from peft_aso.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer

from .records import Record

WAYS = ("generate", "options", "calibrated")  # of scoring an answer, see evaluation.py
MEASURES = ("AA", "FM", "BWT", "FWT")
DRAWS = 2000


def ways_of(record: Record) -> list[str]:
    """The ways of scoring that every test of a run has."""
    return [
        way for way in WAYS if all(way in ways for stage in record["stages"] for ways in stage["correct"].values())
    ]


def matrices(record: Record, way: str, sets: int = DRAWS) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """Accuracies in percent, NaN where nothing was tested, and those of the tasks learned alone.

    Returns:
        `(1 + sets, stages, tasks)`: of all questions, and then of `sets` samples with replacement.
        `(1 + sets, tasks)`, or None if a task was not learned alone or not scored so.
    """
    tasks, alone = record["tasks"], record["alone"]
    sizes = {name: len(ways[way]) for stage in record["stages"] for name, ways in stage["correct"].items()}
    drawn = _drawn(tuple(sorted(sizes.items())), sets)

    def accuracies(answers: str, name: str) -> numpy.ndarray:
        right = numpy.array([answer == "1" for answer in answers], dtype=float)
        return 100 * numpy.concatenate([[right.mean()], right[drawn[name]].mean(1)])

    found = numpy.full((1 + sets, len(record["stages"]), len(tasks)), math.nan)
    for place, stage in enumerate(record["stages"]):
        for name, ways in stage["correct"].items():
            found[:, place, tasks.index(name)] = accuracies(ways[way], name)
    if alone is None or any(way not in alone[name] for name in tasks):
        return found, None
    return found, numpy.stack([accuracies(alone[name][way], name) for name in tasks], 1)


@functools.cache
def _drawn(sizes: tuple[tuple[str, int], ...], sets: int) -> dict[str, numpy.ndarray]:
    """By task `(sets, questions)`: which questions are drawn, the same for every run with the same tests."""
    generator = numpy.random.default_rng(0)
    rows = [{name: generator.integers(size, size=size) for name, size in sizes} for _ in range(sets)]
    return {name: numpy.array([row[name] for row in rows], dtype=int).reshape(sets, size) for name, size in sizes}


def measured(record: Record, way: str, name: str, sets: int = DRAWS) -> numpy.ndarray | None:
    """`(1 + sets,)`: a measure after the last stage, of all questions and of each set drawn; None where it has none.

    A chain of one task has AA alone; FWT needs the tasks learned alone.
    """
    matrix, alone = matrices(record, way, sets)
    if (name != "AA" and len(record["tasks"]) == 1) or (name == "FWT" and alone is None):
        return None
    if name == "FWT":
        values = [forward_transfer(*both) for both in zip(matrix.tolist(), alone.tolist(), strict=True)]
    else:
        of = {"AA": average_accuracy, "FM": forgetting, "BWT": backward_transfer}[name]
        values = [of(each) for each in matrix.tolist()]
    return numpy.array(values)


def difference(pairs: Sequence[tuple[Record, Record]], way: str, name: str = "AA") -> numpy.ndarray | None:
    """`(1 + sets,)`: how much more of a measure the first of two runs has, the mean over pairs; None where one has
    none.

    The same questions are drawn for all pairs: an interval is that of other questions, not of other orders or seeds.
    A pair of runs that were not tested on the same questions is None, too, and FM is where one tested earlier tasks
    after each stage and the other did not.
    """
    gaps = []
    for pair in pairs:
        both = [cached(each, way, name) for each in pair]
        if both[0] is None or both[1] is None:
            return None
        tests = [{task: len(ways[way]) for task, ways in each["stages"][-1]["correct"].items()} for each in pair]
        tested = {each["settings"]["tested"] for each in pair if not each["settings"]["method"].startswith("per_task")}
        if tests[0] != tests[1] or (name == "FM" and len(tested) > 1):
            return None
        gaps.append(both[0] - both[1])
    return numpy.mean(gaps, axis=0)


_CACHE: dict[tuple[int, str, str], tuple[Record, numpy.ndarray | None]] = {}


def cached(record: Record, way: str, name: str) -> numpy.ndarray | None:
    """`measured`, once a record: a table needs the same one in several rows."""
    key = (id(record), way, name)
    if key not in _CACHE:  # with the record, so that its id stays its own
        _CACHE[key] = (record, measured(record, way, name) if way in ways_of(record) else None)
    return _CACHE[key][1]


def shown(values: numpy.ndarray | None, sign: str = "") -> str:
    """A measure with its 95% interval, as text."""
    if values is None:
        return "-"
    low, high = numpy.percentile(values[1:], [2.5, 97.5])
    numbers = (f"{round(float(each), 1) + 0.0:{sign}.1f}" for each in (values[0], low, high))
    return "{} ({} to {})".format(*numbers)
