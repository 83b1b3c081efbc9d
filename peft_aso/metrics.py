"""How well a chain of tasks was learned: average accuracy, forgetting, forward and backward transfer.

Every function takes an accuracy matrix `a` of shape `(stages, tasks)`: `a[t][i]` is the accuracy on task `i` after
training stage `t`, both counted from 0 in the order learned, so there are at most as many rows as columns. `None` and
NaN mean "not measured"; a measure uses the entries that are there. Accuracies are fractions in [0, 1] or percentages
in [0, 100], and results have the same unit.

`stage` selects the measure as it stood after that stage; the default is the last row. At the first stage forgetting
and both transfers are not defined and are NaN. All functions raise `ValueError` for a malformed matrix
(`read_matrix`), for a stage that the matrix does not have, and if none of the entries that a measure needs was
measured.

Equation numbers are those of the ASO-LoRA paper, which counts from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import SupportsFloat

Row = Sequence[SupportsFloat | None]
AccuracyMatrix = Sequence[Row]


def average_accuracy(matrix: AccuracyMatrix, *, stage: int | None = None) -> float:
    """Mean accuracy over the tasks learned so far (AA, Eq. 14): the mean of `a[stage][i]` over `i <= stage`."""
    rows, last = _read(matrix, stage)
    return _mean(rows[last][: last + 1], f"average accuracy: no task was measured after stage {last}")


def forgetting(matrix: AccuracyMatrix, *, stage: int | None = None) -> float:
    """Mean drop of the earlier tasks from their best accuracy so far (FM, Eq. 15-16).

    The mean of `max(a[i][j] for i < stage) - a[stage][j]` over the tasks `j < stage`. As in Eq. 15, the maximum runs
    over all earlier stages, also those before task `j` was trained. It is below 0 when earlier tasks gained.
    """
    rows, last = _read(matrix, stage)
    if last == 0:
        return math.nan
    drops = []
    for task in range(last):
        before = [row[task] for row in rows[:last] if not math.isnan(row[task])]
        drops.append(max(before, default=math.nan) - rows[last][task])
    return _mean(drops, f"forgetting: no earlier task was measured both after stage {last} and before it")


def forward_transfer(matrix: AccuracyMatrix, reference: Row, *, stage: int | None = None) -> float:
    """How much earlier tasks helped to learn the later ones (FWT, Eq. 17).

    The mean of `a[j][j] - reference[j]` over the tasks `1 <= j <= stage` (the paper's tasks 2 to t).

    Args:
        matrix: `(stages, tasks)`.
        reference: `(tasks,)`, the accuracy of the base model trained on each task alone, in the matrix's unit. The
            first entry is not used and may be `None`.
        stage: as for all measures.

    Raises:
        ValueError: also for a reference of another length or unit.
    """
    rows, last = _read(matrix, stage)
    alone = _numbers(reference, "reference")
    if len(alone) != len(rows[0]):
        raise ValueError(
            f"reference has {len(alone)} entries for {len(rows[0])} tasks. Give one per task, None where it was not "
            "measured."
        )
    _check_one_unit([*rows, alone])
    if last == 0:
        return math.nan
    gains = [rows[task][task] - alone[task] for task in range(1, last + 1)]
    return _mean(gains, f"forward transfer: no task from 1 to {last} has a diagonal entry and a reference")


def backward_transfer(matrix: AccuracyMatrix, *, stage: int | None = None) -> float:
    """How much later tasks changed the earlier ones (BWT): the mean of `a[stage][j] - a[j][j]` over `j < stage`.

    It is not in the paper. With every maximum on the diagonal it is minus the forgetting.
    """
    rows, last = _read(matrix, stage)
    if last == 0:
        return math.nan
    changes = [rows[last][task] - rows[task][task] for task in range(last)]
    return _mean(
        changes, f"backward transfer: no earlier task was measured both after stage {last} and after its own training"
    )


def read_matrix(matrix: AccuracyMatrix) -> list[list[float]]:
    """A checked copy of an accuracy matrix, NaN where nothing was measured.

    Raises:
        ValueError: no rows or no columns, rows of different lengths, more stages than tasks, an entry that is no
            number or outside [0, 100], or fractions in one row and percentages in another.
    """
    rows = [_numbers(row, f"row {index} of the accuracy matrix") for index, row in enumerate(matrix)]
    if not rows or not rows[0]:
        raise ValueError("The accuracy matrix is empty. Give one row per stage and one column per task.")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"The accuracy matrix has rows of {lengths[0]} and of {lengths[-1]} entries. Give every stage one entry "
            "per task of the chain, None where it was not measured."
        )
    if len(rows) > len(rows[0]):
        raise ValueError(
            f"The accuracy matrix has {len(rows)} stages for {len(rows[0])} tasks. Give one row per stage, of which "
            "each learns one task."
        )
    _check_one_unit(rows)
    return rows


def in_percent(rows: Iterable[Iterable[float]]) -> bool:
    """Whether the entries are percentages: some entry is above 1. NaN entries are passed over."""
    return any(value > 1 for row in rows for value in row)


def _read(matrix: AccuracyMatrix, stage: int | None) -> tuple[list[list[float]], int]:
    """The checked matrix and the index of the stage."""
    rows = read_matrix(matrix)
    if stage is not None and not 0 <= stage < len(rows):
        raise ValueError(f"There is no stage {stage}: the matrix has stages 0 to {len(rows) - 1}.")
    return rows, len(rows) - 1 if stage is None else stage


def _numbers(row: Row, what: str) -> list[float]:
    """The row as floats within [0, 100], NaN for None."""
    try:
        numbers = [math.nan if value is None else float(value) for value in row]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is no list of numbers and None: {error}.") from error
    for position, value in enumerate(numbers):
        if not (math.isnan(value) or 0 <= value <= 100):
            raise ValueError(
                f"{what}, entry {position}, is {value}. Accuracies are fractions in [0, 1] or percentages in [0, 100]."
            )
    return numbers


def _check_one_unit(rows: Sequence[Sequence[float]]) -> None:
    """Refuse fractions in one row and percentages in another.

    Row by row and not entry by entry: 0.5 may be a percentage where a task has collapsed, and the other entries of its
    stage show which unit it is.
    """
    if not in_percent(rows):
        return
    for row in rows:
        if not in_percent([row]) and any(0 < value < 1 for value in row):
            raise ValueError(
                f"Accuracies {[value for value in row if not math.isnan(value)]} are fractions, others are "
                "percentages (above 1). Use one unit; if they are percentages below 1, divide all accuracies by 100."
            )


def _mean(values: Iterable[float], if_none: str) -> float:
    """The mean of the values that are not NaN; `if_none` begins the error's text where there are none."""
    measured = [value for value in values if not math.isnan(value)]
    if not measured:
        raise ValueError(f"{if_none}. Measure at least one, or choose another stage.")
    return math.fsum(measured) / len(measured)
