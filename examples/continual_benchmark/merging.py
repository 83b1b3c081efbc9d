"""Merge the tasks of a finished run in other ways, and test the merged models: no training.

python examples/continual_benchmark/merging.py runs/continual_benchmark/aso_lora-order1-seed0 soft_regmean regmean

After each stage the tasks so far are merged and the newest is tested, at the end all are. Each way is a run of its
own, in a folder next to the first one. A way that reads input directions needs a run with --directions.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from continual_benchmark.chain import start_method, test, write
from continual_benchmark.data import read_tasks
from continual_benchmark.methods import METHODS
from continual_benchmark.records import RESULTS, Record
from continual_benchmark.settings import Settings
from continual_benchmark.table import report


def merge_run(folder: Path, rules: Sequence[str]) -> list[Record]:
    """The records of a run's chain, merged in these ways; each is on disk too."""
    record: Record = json.loads((folder / RESULTS).read_text())
    known = {each.name for each in fields(Settings)}
    chosen: dict[str, Any] = {name: value for name, value in record["settings"].items() if name in known}
    settings = Settings(**chosen)
    tasks = read_tasks(record["tasks"], settings)
    method = start_method(METHODS[settings.method], tasks[0], settings)
    method.restore(folder / f"state_{len(tasks)}", tasks)
    found = []
    for rule in rules:
        stages = []
        for stage, task in zip(record["stages"], tasks, strict=True):
            method.model.set_adapter(task.name)
            merged = copy.deepcopy(method.model).merge_and_unload(merge=rule)
            tested = tasks if task is tasks[-1] else [task]
            correct = {each.name: test(merged, method.tokenizer, each, settings) for each in tested}
            stages.append({"task": task.name, "correct": correct, "psi": stage["psi"]})
        found.append({**record, "settings": {**record["settings"], "merge": rule}, "stages": stages})
        write(folder.with_name(f"{folder.name}-{rule}") / RESULTS, found[-1])
    return found


if __name__ == "__main__":
    for name in ("transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for merged_run in merge_run(Path(sys.argv[1]), sys.argv[2:]):
        print(report(merged_run))
