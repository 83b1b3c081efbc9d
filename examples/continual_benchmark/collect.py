"""Finished runs, read from their folders and put together: seeds of one thing, things of one order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .orders import short
from .settings import FOR, Settings, completed, usual_weight

# two runs that differ in these alone are the same thing, and stand in one row; the last two say what is looked at
_FREE = ("seed", "order", "score", "diagnose")
# settings that say how much was run; runs that differ here are not to be compared
SCALE = ("model", "data", "full", "train_limit", "test_limit", "validation", "epochs", "batch_size")


@dataclass
class Run:
    """One finished run.

    Attributes:
        label: the method's name, and the settings in which it differs from other runs here.
        order: the number of its order, or its tasks' names.
    """

    path: Path
    results: dict[str, Any]
    label: str
    order: str

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.results["settings"]
        return found

    def number(self, way: str, name: str) -> float | None:
        """AA, FM, FWT or BWT."""
        value: float | None = self.results["summary"][way].get(name)
        return value


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """All finished runs in these folders and in folders within them.

    Raises:
        SystemExit: there is none.
    """
    folders = list(folders)
    paths = sorted({path for folder in folders for path in folder.rglob("results.json")})
    if not paths:
        raise SystemExit(f"No results.json in {', '.join(map(str, folders))}: run.py writes one when a run is done.")
    found = []
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        if "summary" in results and "stages" in results:
            results["settings"] = completed(results["settings"])
            found.append(Run(path.parent, results, results["title"], short(results["tasks"])))
    for run in found:
        run.label = label_of(run, found)
    return found


def label_of(run: Run, runs: Sequence[Run], but: Sequence[str] = ()) -> str:
    """The method, and what sets it apart from others that have the setting: settings that are not the default. Such a
    lambda and hard orthogonality are always named.

    Args:
        but: settings that are not named.
    """
    usual = {**Settings().chosen(), "penalty_weight": usual_weight(run.settings)}

    def differs(name: str) -> bool:
        beside = [each for each in runs if each.settings["method"] in FOR.get(name, [each.settings["method"]])]
        return any(each.settings.get(name) != run.settings[name] for each in beside)

    own = [name for name in run.settings if name not in ("method", *_FREE, *but)]
    apart = [
        name for name in own
        if run.settings[name] != usual.get(name) and (differs(name) or name in ("penalty_weight", "similarity"))
    ]  # fmt: skip
    words = [f"{name.replace('_', ' ')} {_shown(run.settings[name])}" for name in apart]
    return run.results["title"] + (f" ({', '.join(words)})" if words else "")


def same_place(run: Run, other: Run) -> bool:
    """Whether they are of one order and seed."""
    return (other.order, other.settings["seed"]) == (run.order, run.settings["seed"])


def penalty_of(run: Run) -> tuple[str, tuple[float, ...], bool] | None:
    """The form of a run's penalty, lambda, and whether it is hard (psi = 1); None if it has no penalty."""
    settings = run.settings
    weights = tuple(settings["penalty_weight"] or ())
    if not any(weights):
        return None
    published = settings["method"] == "o_lora"
    return "l1" if published else settings["penalty"], weights, published or settings["similarity"] == "none"


def without_penalty(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run with lambda 0 in the same place, alike in all else that it has: IncLoRA's, or ASO-LoRA's with weight 0;
    None if it is not among these."""
    for method in ("inc_lora", "aso_lora"):
        for each in (each for each in runs if each.settings["method"] == method and penalty_of(each) is None):
            if _alike(run, each):
                return each
    return None


def hard_twin(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run with psi = 1 beside a soft one of the same penalty, all else alike; None if it is not among these."""
    own = penalty_of(run)
    if own is None or own[2]:
        return None
    return next((each for each in runs if penalty_of(each) == (*own[:2], True) and _alike(run, each)), None)


def _alike(run: Run, other: Run) -> bool:
    """Whether they are in one place, and one in all settings that IncLoRA has."""
    own = [name for name in run.settings if name not in ("method", "tested", *_FREE)]
    shared = [name for name in own if "inc_lora" in FOR.get(name, ["inc_lora"])]
    return same_place(run, other) and all(other.settings[name] == run.settings[name] for name in shared)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_shown, value))
    if value is None:
        return "default"
    if isinstance(value, bool):  # not by equality: 1 is a number here
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def comparable(runs: Sequence[Run]) -> None:
    """Refuse to put runs of different scale, or one run twice, into one table.

    Raises:
        SystemExit: with what differs, or which are the same.
    """
    there: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        twin = there.setdefault((run.label, run.order, run.settings["seed"]), run)
        if twin is not run:
            raise SystemExit(f"{twin.path} and {run.path} are the same run: leave one out.")
    for name in SCALE:
        values = {json.dumps(run.settings.get(name)) for run in runs}
        if len(values) > 1:
            raise SystemExit(
                f"These runs differ in {name} ({', '.join(sorted(values))}): give folders whose runs belong together."
            )
