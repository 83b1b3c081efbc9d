"""The metrics against matrices worked by hand, and against formulas on arrays for any matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_aso.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer, in_percent, read_matrix

LOWER = [[90, None, None], [80, 70, None], [85, 60, 50]]  # nothing measured before a task is trained
MEASURES = (average_accuracy, forgetting, backward_transfer, partial(forward_transfer, reference=[None, None]))


@st.composite
def full_matrices(draw: st.DrawFn) -> list[list[float]]:
    size = draw(st.integers(2, 6))
    percentages = st.one_of(st.just(0.0), st.floats(1.5, 100))  # none within (0, 1): units have their own test
    return draw(st.lists(st.lists(percentages, min_size=size, max_size=size), min_size=size, max_size=size))


def test_by_hand() -> None:
    assert average_accuracy(LOWER) == average_accuracy(LOWER, stage=2) == pytest.approx((85 + 60 + 50) / 3)
    # task 0: best before is 90 (stage 0), now 85; task 1: 70, now 60
    assert forgetting(LOWER) == pytest.approx((5 + 10) / 2)
    assert backward_transfer(LOWER) == pytest.approx(-(5 + 10) / 2)
    # tasks 1 and 2 right after their training against training them alone; the first is not used
    assert forward_transfer(LOWER, [None, 72, 44]) == pytest.approx((70 - 72 + 50 - 44) / 2)
    assert (average_accuracy(LOWER, stage=0), average_accuracy(LOWER, stage=1)) == (90, 75)
    assert (forgetting(LOWER, stage=1), backward_transfer(LOWER, stage=1)) == (10, -10)
    assert forward_transfer(LOWER, [None, 72, 44], stage=1) == -2
    assert (average_accuracy(LOWER[:2]), forgetting(LOWER[:2])) == (75, 10)  # a run in progress

    # task 0 peaks at stage 1, after another task
    matrix = [[0.5, None, None], [0.75, 0.5, None], [0.625, 0.5, 1.0]]
    assert forgetting(matrix) == backward_transfer(matrix) == pytest.approx(0.125 / 2)
    # task 1 was measured before it was trained: Eq. 15 takes i from 1 to t - 1, whatever the task
    assert forgetting([[0.5, 0.75, 0], [0.5, 0.25, 0], [0.5, 0.25, 0]]) == pytest.approx(0.5 / 2)


def test_one_task_has_an_average_and_nothing_else_and_missing_entries_are_passed_over() -> None:
    assert average_accuracy([[0.75]]) == 0.75
    for value in (forgetting([[0.75]]), backward_transfer([[0.75]]), forward_transfer([[0.75]], [None])):
        assert math.isnan(value)
    assert math.isnan(forgetting(LOWER, stage=0))
    nan = math.nan
    matrix = [[90, nan, nan], [nan, nan, nan], [85, 60, nan]]
    assert average_accuracy(matrix) == (85 + 60) / 2
    assert (forgetting(matrix), backward_transfer(matrix)) == (5, -5)
    assert forward_transfer([[90, None], [80, 70]], [None, 65]) == 5
    assert forward_transfer(LOWER, [None, None, 44]) == 6


@pytest.mark.parametrize("measure", MEASURES)
def test_what_cannot_be_measured_is_refused(measure: Callable[..., float]) -> None:
    name = getattr(measure, "func", measure).__name__.replace("_", " ")
    with pytest.raises(ValueError, match=f"{name}.*Measure at least one"):
        measure([[None, None], [None, None]])
    for stage in (-1, 3):
        with pytest.raises(ValueError, match=f"no stage {stage}: the matrix has stages 0 to 2"):
            measure(LOWER, stage=stage)
    with pytest.raises(ValueError, match="rows of 1 and of 2 entries"):
        measure([[0.5, 0.5], [0.5]])


@pytest.mark.parametrize(
    ("matrix", "reference", "message"),
    [
        ([], [], "empty"),
        ([[0.5], [0.5]], [], "2 stages for 1 tasks"),
        ([[101, 2], [3, 4]], [], r"entry 0, is 101.0\. Accuracies are"),
        ([[0.5, 0.5], [0.5, -0.1]], [], r"row 1 .* entry 1, is -0.1"),
        ([[0.5, math.inf], [0.5, 0.5]], [], "is inf"),
        ([0.5, 0.5], [], "row 0 of the accuracy matrix is no list of numbers"),
        ([[0.9, None], [80, 70]], [], r"\[0.9\] are fractions, others are percentages"),
        (LOWER, [None, 72], "reference has 2 entries for 3 tasks"),
        (LOWER, [None, 0.72, 0.44], "fractions, others are percentages"),
        (LOWER, [None, 720, 44], "reference, entry 1, is 720"),
    ],
)
def test_a_malformed_matrix_or_reference_is_refused(matrix: list, reference: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_transfer(matrix, reference)


def test_reading_takes_arrays_and_leaves_its_input_alone() -> None:
    rows = read_matrix(np.array([[0.5, np.nan], [0.25, 1.0]], dtype=np.float32))
    assert rows[1] == [0.25, 1.0] and rows[0][0] == 0.5 and math.isnan(rows[0][1])
    assert all(type(value) is float for row in rows for value in row)
    source = [[90, None], [0.5, 80]]  # a collapsed task may have less than one percent
    read_matrix(source)[0][0] = 1.0
    assert source == [[90, None], [0.5, 80]]
    assert in_percent([[math.nan, 1.5]]) and not in_percent([[0.0, 1.0, math.nan]])


@given(full_matrices())
def test_the_measures_agree_with_formulas_on_arrays(matrix: list[list[float]]) -> None:
    a, t = np.array(matrix), len(matrix) - 1
    assert average_accuracy(matrix) == pytest.approx(a[t].mean())
    assert forgetting(matrix) == pytest.approx((a[:t].max(axis=0) - a[t])[:t].mean(), abs=1e-9)
    assert backward_transfer(matrix) == pytest.approx((a[t] - np.diag(a))[:t].mean(), abs=1e-9)
    assert forward_transfer(matrix, matrix[0]) == pytest.approx((np.diag(a) - a[0])[1:].mean(), abs=1e-9)
    if in_percent(matrix):  # the unit carries through
        fractions = [[value / 100 for value in row] for row in matrix]
        assert forgetting(fractions) * 100 == pytest.approx(forgetting(matrix), abs=1e-9)
    still = [matrix[0]] * len(matrix)
    assert forgetting(still) == backward_transfer(still) == forward_transfer(still, matrix[0]) == 0
