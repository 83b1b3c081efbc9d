"""One line of the table: what was measured on both sides, what the ratio is, and whether it meets its target."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Bound = Literal["at most", "at least"]

_SMALL = {"s": (1e-3, 1e3, "ms"), "bytes": (float("inf"), 2**-20, "MiB"), "FLOP": (float("inf"), 1e-9, "GFLOP")}


@dataclass
class Sameness:
    """How far two sides that should compute the same thing are apart.

    Attributes:
        of: what was compared, and how the difference is taken.
        difference: the largest difference.
        limit: the largest that passes.
    """

    of: str
    difference: float
    limit: float

    @property
    def same(self) -> bool:
        """Whether the sides agree (a NaN does not)."""
        return bool(self.difference <= self.limit)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


@dataclass
class Record:
    """One line.

    Attributes:
        line: its name, as `--only` takes it.
        model: what it ran on.
        what, against: the two sides in words.
        ours, theirs: one value a repeat, in `unit`. Either may be empty where a line has one side only.
        bound: "at most": the ratio is ours / theirs; "at least": theirs / ours (how many times less ours takes).
        target: what the ratio should be; None where the line is for information.
        unit: "s", "bytes", "FLOP", "nodes" or whatever else the values are.
        sameness: the checks that both sides compute the same thing.
        notes: everything else worth keeping, by name.
    """

    line: str
    model: str
    what: str
    against: str
    ours: list[float]
    theirs: list[float]
    bound: Bound = "at most"
    target: float | None = None
    unit: str = "s"
    sameness: list[Sameness] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The median of the ratios of each pair, where both sides ran equally often in turn (a machine whose speed
        drifts does less harm so), else median against median. None where a side has no values, or a zero to divide by.
        """
        if not self.ours or not self.theirs:
            return None
        over, under = (self.ours, self.theirs) if self.bound == "at most" else (self.theirs, self.ours)
        if len(over) != len(under):
            over, under = [statistics.median(over)], [statistics.median(under)]
        return statistics.median(a / b for a, b in zip(over, under, strict=True)) if all(under) else None

    @property
    def passed(self) -> bool | None:
        """Whether the ratio meets the target and both sides agree; None without a target."""
        if self.target is None:
            return None
        if self.ratio is None or not all(check.same for check in self.sameness):
            return False
        return self.ratio <= self.target if self.bound == "at most" else self.ratio >= self.target

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it, with what follows from the values."""
        values = {name: value for name, value in asdict(self).items() if name != "sameness"}
        sameness = [check.as_dict() for check in self.sameness]
        return {**values, "ratio": self.ratio, "passed": self.passed, "sameness": sameness}


def shown(values: Sequence[float], unit: str) -> str:
    """Median, spread and number of repeats as text."""
    if not values:
        return "-"
    below, factor, name = _SMALL.get(unit, (0.0, 1.0, unit))
    middle = statistics.median(values)
    scale, unit = (factor, name) if middle < below else (1.0, unit)
    numbers = [f"{value * scale:.4g}" for value in (middle, min(values), max(values))]
    return f"{numbers[0]} {unit} ({numbers[1]} to {numbers[2]}, n={len(values)})"


def verdict(record: Record) -> str:
    """pass, falls short, or "-" for a line without a target."""
    return {None: "-", True: "pass", False: "falls short"}[record.passed]


def short(value: Any) -> str:
    """A note on one line; what is longer stands in the JSON file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and not any(isinstance(item, (dict, list)) for item in value.values()):
        return ", ".join(f"{name} {short(item)}" for name, item in value.items())
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        return ", ".join(short(item) for item in value)
    text = str(value)
    return text if len(text) <= 300 else f"({len(value)} entries, in the JSON file)"


def block(record: Record) -> str:
    """All there is to a line, for reading while the run goes on."""
    rows = [
        f"{record.line} [{record.model}]: {record.what}",
        f"    ours    {shown(record.ours, record.unit)}",
        f"    theirs  {shown(record.theirs, record.unit)}   {record.against}",
    ]
    if record.ratio is not None:
        target = "" if record.target is None else f", target {record.bound} {record.target:g}: {verdict(record)}"
        rows.append(f"    ratio   {record.ratio:.4g}{target}")
    for check in record.sameness:
        found = "same" if check.same else "NOT THE SAME"
        rows.append(f"    {found}: {check.of}: {check.difference:.2e} (limit {check.limit:.0e})")
    rows += [f"    {name}: {short(value)}" for name, value in record.notes.items()]
    return "\n".join(rows)


def table(records: Sequence[Record]) -> str:
    """The table at the end: one row a line."""
    heads = ("line", "model", "ours, median (spread)", "theirs, median (spread)", "ratio", "target", "verdict")
    rows = [heads]
    for record in records:
        ratio = "-" if record.ratio is None else f"{record.ratio:.4g}"
        target = "-" if record.target is None else f"{'<=' if record.bound == 'at most' else '>='} {record.target:g}"
        sides = (shown(record.ours, record.unit), shown(record.theirs, record.unit))
        rows.append((record.line, record.model, *sides, ratio, target, verdict(record)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
