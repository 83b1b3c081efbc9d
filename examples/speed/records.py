"""Times of two sides in turn, the check that both compute the same, and the table and figure of docs/performance.md:

    python examples/speed/records.py docs/results/speed.json docs/images/growth.png

It prints the table; the figure is drawn if a file for it is named.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call; what an accelerator still has to do is part of it."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def in_turn(*functions: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[list[float]]:
    """Seconds of each function, A B A B, after `warm_up` calls of each that do not count."""
    for function in functions * warm_up:
        function()
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a part of the largest value of `theirs`."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


@dataclass
class Sameness:
    """How far two sides that should compute the same are apart, and how far they may be."""

    of: str
    difference: float
    limit: float

    @property
    def same(self) -> bool:
        return self.difference <= self.limit  # NaN is not


@dataclass
class Record:
    """One row of the table.

    Attributes:
        line, model: as `--only` and `--model` take them.
        what, against: the two sides in words.
        ours, theirs: one value a repeat, in `unit`. `theirs` is empty where a line has one side.
        bound: "at most": the ratio is ours / theirs; "at least": theirs / ours.
        target: what the ratio should be; None for a line without one.
        x: the size that a line of growth varies.
        notes: other numbers, by name.
        command, machine: how and where it was measured; `write` sets them.
    """

    line: str
    model: str
    what: str
    against: str
    ours: list[float]
    theirs: list[float]
    bound: str = "at most"
    target: float | None = None
    unit: str = "s"
    sameness: list[Sameness] = field(default_factory=list)
    x: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    machine: str = ""

    @property
    def ratio(self) -> float | None:
        """The median of each pair's ratio, so that a machine whose speed drifts harms less; where the sides did not
        run equally often, median against median. None where a side has no values."""
        if not self.ours or not self.theirs:
            return None
        over, under = (self.ours, self.theirs) if self.bound == "at most" else (self.theirs, self.ours)
        if len(over) != len(under):
            over, under = [statistics.median(over)], [statistics.median(under)]
        return statistics.median(a / b for a, b in zip(over, under, strict=True))

    @property
    def verdict(self) -> str:
        """ "pass" where the ratio meets the target and both sides compute the same, else "falls short"."""
        if self.target is None:
            return ""
        ratio = float("nan") if self.ratio is None else self.ratio
        met = ratio <= self.target if self.bound == "at most" else ratio >= self.target
        return "pass" if met and all(check.same for check in self.sameness) else "falls short"


def machine() -> str:
    """What the numbers are measured on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    parts = [f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"]
    parts += [f"{torch.get_num_threads()} threads", f"Python {platform.python_version()}"]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join(parts + [f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "captum")])


def read(path: Path) -> list[Record]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Record(**{**row, "sameness": [Sameness(**check) for check in row["sameness"]]}) for row in rows]


def write(path: Path, new: Sequence[Record], command: str) -> None:
    """Put records into a JSON file: each in the place of the one that measured the same, or at the end."""
    records = {(each.line, each.model, each.what): each for each in (read(path) if path.exists() else [])}
    for each in new:
        each.command, each.machine = command, machine()
        records[each.line, each.model, each.what] = each
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(asdict(each)) for each in records.values())
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def shown(values: Sequence[float], unit: str) -> str:
    """Median, spread and number of values as text."""
    if not values:
        return ""
    if unit == "bytes":
        unit, values = "MiB", [value / 2**20 for value in values]
    elif unit == "s" and statistics.median(values) < 0.1:
        unit, values = "ms", [value * 1e3 for value in values]
    middle, least, most = (f"{value:.4g}" for value in (statistics.median(values), min(values), max(values)))
    spread = f"{least} to {most}, " if len(values) > 1 else ""
    return f"{middle} {unit}".rstrip() + f" ({spread}n={len(values)})"


def table(records: Sequence[Record]) -> str:
    """The records in Markdown without those of growth, and the machines that its last column names."""
    records = [each for each in records if each.x is None]
    machines = list(dict.fromkeys(each.machine for each in records))
    rows = [("line", "model", "ours", "peer", "ratio", "target", "", "options", "on"), ("---",) * 9]
    for each in records:
        options = re.sub(r"^\S+ \S+| --(model|only|out) \S+", "", each.command).strip()
        ratio = "" if each.ratio is None else f"{each.ratio:.3g}"
        target = "" if each.target is None else f"{each.bound} {each.target:g}"
        sides = ((each.what, each.ours), (each.against, each.theirs))
        cells = [f"{words}: {shown(values, each.unit)}".strip(": ") for words, values in sides]
        on = chr(ord("A") + machines.index(each.machine))
        rows.append((f"`{each.line}`", each.model, *cells, ratio, target, each.verdict, options, on))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {chr(ord('A') + index)}: {name}" for index, name in enumerate(machines))])


def growth_figure(records: Sequence[Record], path: Path) -> None:
    """One panel for each line of growth: seconds of both sides by the size that varies, median and spread."""
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(each.line for each in records if each.x is not None))
    rows = -(-len(lines) // 2)
    figure = Figure(figsize=(8, 3 * rows), layout="constrained")
    for axes, line in zip(figure.subplots(rows, 2, squeeze=False).flat, lines, strict=False):
        points = sorted((each for each in records if each.line == line), key=lambda each: each.x or 0)
        for label, side in (("ours", "ours"), (points[0].against, "theirs")):
            values = [getattr(each, side) for each in points]
            if all(values):
                sizes = [each.x for each in points]
                axes.plot(sizes, [statistics.median(each) for each in values], marker="o", label=label)
                axes.fill_between(sizes, [min(each) for each in values], [max(each) for each in values], alpha=0.2)
        axes.set(
            xlabel=line.removeprefix("growth."), ylabel="seconds", title=points[0].what.split(",")[0], ylim=(0, None)
        )
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    print(table(found))
    if len(sys.argv) > 2:
        growth_figure(found, Path(sys.argv[2]))
