"""Two tiny tasks, and the settings of a run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = {"colors": ["blue", "green"], "signs": ["yes", "no"]}
WORDS = ["what", "color", "is", "the", "sky", "grass", "sun", "night", "answer", "good", "bad"]
WORDS += [option for options in TASKS.values() for option in options]


def settings_of(benchmark: Any, data: Path, model: Path, out: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "order": "colors,signs", "model": str(model), "data": str(data), "out": str(out), "batch_size": 5, "rank": 2,
        "score": "both", "precision": "float32", "probe": 2, "steps": 4, "refresh": 1, "replay": 0.2,
        "ewc_examples": 3, "dropout": 0.0, "no_reference": True,
    }  # fmt: skip
    return benchmark("settings").Settings(**{**given, **changes})
