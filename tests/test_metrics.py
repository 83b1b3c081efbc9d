"""The metrics against matrices worked by hand, and properties that hold for any matrix."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_aso.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    in_percent,
    read_matrix,
)

# Three tasks, percentages, nothing measured before a task is trained.
LOWER = [
    [90, None, None],
    [80, 70, None],
    [85, 60, 50],
]
MEASURES = {
    "average_accuracy": average_accuracy,
    "forgetting": forgetting,
    "backward_transfer": backward_transfer,
    "forward_transfer": partial(forward_transfer, reference=[None, None]),
}


def percentages() -> st.SearchStrategy[float]:
    # Never within (0, 1): such rows are the subject of the test on units.
    return st.one_of(st.just(0.0), st.floats(1.5, 100))


@st.composite
def full_matrices(draw: st.DrawFn) -> list[list[float]]:
    size = draw(st.integers(2, 6))
    row = st.lists(percentages(), min_size=size, max_size=size)
    return draw(st.lists(row, min_size=size, max_size=size))


def test_by_hand_at_the_last_stage() -> None:
    assert average_accuracy(LOWER) == pytest.approx((85 + 60 + 50) / 3)
    # Task 0: best before is 90 (stage 0), now 85. Task 1: 70, now 60.
    assert forgetting(LOWER) == pytest.approx((5 + 10) / 2)
    assert backward_transfer(LOWER) == pytest.approx(-(5 + 10) / 2)
    # Tasks 1 and 2 right after their training, against training them alone; the first is not used.
    assert forward_transfer(LOWER, [None, 72, 44]) == pytest.approx((70 - 72 + 50 - 44) / 2)


def test_by_hand_at_an_earlier_stage() -> None:
    assert average_accuracy(LOWER, stage=0) == 90
    assert average_accuracy(LOWER, stage=1) == 75
    assert forgetting(LOWER, stage=1) == 10
    assert backward_transfer(LOWER, stage=1) == -10
    assert forward_transfer(LOWER, [None, 72, 44], stage=1) == -2
    assert average_accuracy(LOWER, stage=2) == average_accuracy(LOWER)


def test_the_maximum_is_over_all_earlier_stages_not_the_diagonal() -> None:
    # Task 0 peaks at stage 1, after another task: forgetting counts from there, backward transfer does not.
    matrix = [[0.5, None, None], [0.75, 0.5, None], [0.625, 0.5, 1.0]]
    assert forgetting(matrix) == pytest.approx((0.125 + 0) / 2)
    assert backward_transfer(matrix) == pytest.approx((0.125 + 0) / 2)
    # Measured before it was trained: Eq. 15 takes i from 1 to t - 1, whatever the task.
    assert forgetting([[0.5, 0.75], [0.5, 0.25]]) == 0
    assert forgetting([[0.5, 0.75, 0], [0.5, 0.25, 0], [0.5, 0.25, 0]]) == pytest.approx(0.5 / 2)


def test_entries_above_the_diagonal_do_not_enter_average_accuracy_or_transfer() -> None:
    filled = [[90, 1, 2], [80, 70, 3], [85, 60, 50]]
    for name in ("average_accuracy", "backward_transfer"):
        for stage in (1, 2):
            assert MEASURES[name](filled, stage=stage) == MEASURES[name](LOWER, stage=stage)
    assert average_accuracy(filled, stage=0) == 90


def test_one_task_has_an_average_and_nothing_else() -> None:
    assert average_accuracy([[0.75]]) == 0.75
    assert math.isnan(forgetting([[0.75]]))
    assert math.isnan(backward_transfer([[0.75]]))
    assert math.isnan(forward_transfer([[0.75]], [None]))
    assert math.isnan(forgetting(LOWER, stage=0))


def test_a_run_in_progress_has_fewer_rows_than_tasks() -> None:
    assert average_accuracy(LOWER[:2]) == 75
    assert forgetting(LOWER[:2]) == 10


def test_missing_entries_are_passed_over() -> None:
    nan = math.nan
    matrix = [[90, nan, nan], [nan, nan, nan], [85, 60, nan]]
    assert average_accuracy(matrix) == (85 + 60) / 2
    # Task 1 was never measured before the last stage, so only task 0 has a drop.
    assert forgetting(matrix) == 5
    assert backward_transfer(matrix) == -5
    assert forward_transfer([[90, None], [80, 70]], [None, 65]) == 5
    assert forward_transfer(LOWER, [None, None, 44]) == 6


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_measured_is_an_error_that_names_the_measure(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', ' ')}.*Measure at least one"):
        MEASURES[name]([[None, None], [None, None]])


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[0.5, 0.5], [0.5]], "rows of 1 and of 2 entries"),
        ([[0.5], [0.5]], "2 stages for 1 tasks"),
        ([[101, 2], [3, 4]], r"entry 0, is 101.0: accuracies are"),
        ([[0.5, 0.5], [0.5, -0.1]], r"row 1 .* entry 1, is -0.1"),
        ([[0.5, math.inf], [0.5, 0.5]], "is inf"),
        ([["dbpedia", 1], [2, 3]], "row 0 of the accuracy matrix is no list of numbers"),
        ([0.5, 0.5], "row 0 of the accuracy matrix is no list of numbers"),
        ([[0.9, None], [80, 70]], r"\[0.9\] are fractions, others are percentages"),
    ],
)
def test_a_malformed_matrix_is_refused(name: str, matrix: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MEASURES[name](matrix)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("stage", [-1, 3])
def test_a_stage_that_does_not_exist_is_refused(name: str, stage: int) -> None:
    with pytest.raises(ValueError, match=f"no stage {stage}: the matrix has stages 0 to 2"):
        MEASURES[name](LOWER, stage=stage)


def test_a_bad_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference has 2 entries for 3 tasks"):
        forward_transfer(LOWER, [None, 72])
    with pytest.raises(ValueError, match="fractions, others are percentages"):
        forward_transfer(LOWER, [None, 0.72, 0.44])
    with pytest.raises(ValueError, match="reference, entry 1, is 720"):
        forward_transfer(LOWER, [None, 720, 44])


def test_a_collapsed_task_may_have_less_than_one_percent() -> None:
    assert average_accuracy([[90, None], [0.5, 80]]) == 40.25


def test_reading_takes_arrays_and_leaves_its_input_alone() -> None:
    array = np.array([[0.5, np.nan], [0.25, 1.0]], dtype=np.float32)
    rows = read_matrix(array)
    assert rows[1] == [0.25, 1.0] and rows[0][0] == 0.5 and math.isnan(rows[0][1])
    assert all(type(value) is float for row in rows for value in row)
    source = [[90, None], [80, 70]]
    read_matrix(source)[0][0] = 1.0
    assert source == [[90, None], [80, 70]]


def test_percentages_are_told_by_an_entry_above_one() -> None:
    assert in_percent([[math.nan, 1.5]])
    assert not in_percent([[0.0, 1.0, math.nan]])


@given(full_matrices())
def test_the_measures_agree_with_array_formulas(matrix: list[list[float]]) -> None:
    a = np.array(matrix)
    t = len(matrix) - 1
    assert average_accuracy(matrix) == pytest.approx(a[t].mean())
    assert forgetting(matrix) == pytest.approx((a[:t].max(axis=0) - a[t])[:t].mean(), abs=1e-9)
    assert backward_transfer(matrix) == pytest.approx((a[t] - np.diag(a))[:t].mean(), abs=1e-9)


@given(full_matrices())
def test_forgetting_is_at_least_the_loss_against_the_diagonal(matrix: list[list[float]]) -> None:
    assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-9


@given(full_matrices())
def test_the_unit_carries_through(matrix: list[list[float]]) -> None:
    fractions = [[value / 100 for value in row] for row in matrix]
    reference = [50.0] * len(matrix)
    assert average_accuracy(fractions) * 100 == pytest.approx(average_accuracy(matrix))
    assert forgetting(fractions) * 100 == pytest.approx(forgetting(matrix), abs=1e-9)
    transfer = forward_transfer(fractions, [value / 100 for value in reference]) * 100
    if in_percent(matrix):
        assert transfer == pytest.approx(forward_transfer(matrix, reference), abs=1e-9)
    else:
        assert transfer == pytest.approx(-50)


@given(full_matrices())
def test_a_model_that_never_changes_forgets_nothing(matrix: list[list[float]]) -> None:
    still = [matrix[0]] * len(matrix)
    assert forgetting(still) == 0
    assert backward_transfer(still) == 0
    assert forward_transfer(still, matrix[0]) == 0
