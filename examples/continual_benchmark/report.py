"""What a run prints when it is done."""

from __future__ import annotations

from typing import Any

_SENSE = "AA average accuracy, FM forgetting (lower is better), BWT backward and FWT forward transfer (higher is)"


def report(results: dict[str, Any]) -> str:
    """The accuracy matrix and the four numbers with their intervals, for each way of scoring."""
    lines = []
    for way, found in results["summary"].items():
        lines += ["", f"{results['title']}, accuracy in percent, no task label given ({way})", ""]
        lines += _matrix(results["tasks"], found["matrix"], found["alone"])
        lines += [""] + [_number(name, found) for name in ("AA", "FM", "BWT", "FWT") if name in found]
    seconds = sum(sum(stage["seconds"].values()) for stage in results["stages"])
    lines += ["", f"({_SENSE}; 95% intervals over test examples)", f"{seconds / 60:.1f} minutes. {results['folder']}"]
    return "\n".join(lines)


def _matrix(tasks: list[str], matrix: list[list[float | None]], alone: list[float] | None) -> list[str]:
    width = max(8, *(len(name) + 2 for name in tasks))
    head = max(16, *(len(name) + 2 for name in tasks))

    def row(title: str, values: list[float | None]) -> str:
        return title.ljust(head) + "".join(("" if v is None else f"{v:.1f}").rjust(width) for v in values)

    lines = ["after learning".ljust(head) + "".join(name.rjust(width) for name in tasks)]
    lines += [row(name, values) for name, values in zip(tasks, matrix, strict=True)]
    return lines if alone is None else [*lines, row("(each alone)", list(alone))]


def _number(name: str, found: dict[str, Any]) -> str:
    low, high = found["95%"][name]
    sign = "" if name == "AA" else "+"
    return f"{name:4}{found[name]:{sign}.1f}   ({low:{sign}.1f} to {high:{sign}.1f})"
