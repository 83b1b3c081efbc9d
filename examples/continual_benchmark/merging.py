"""Merge the tasks of a finished run in other ways, and test the merged models: no training.

    python examples/continual_benchmark/merging.py runs/continual_benchmark/inc_lora-order1-seed0 regmean running_mean

After each stage the tasks so far are merged and the newest is tested, at the end all are. Each way is a run of its
own, in a folder next to the first one. A way that reads input directions needs a run with --directions.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/: the package, and tasks.py
    from continual_benchmark.chain import start_method, test, write
    from continual_benchmark.data import read_tasks
    from continual_benchmark.methods import METHODS
    from continual_benchmark.records import RESULTS
    from continual_benchmark.settings import Settings
    from continual_benchmark.table import report

    run, *rules = sys.argv[1:]
    folder = Path(run)
    record: dict[str, Any] = json.loads((folder / RESULTS).read_text())
    known = {each.name for each in fields(Settings)}
    settings = Settings(**{name: value for name, value in record["settings"].items() if name in known})
    tasks = read_tasks(record["tasks"], settings)
    for name in ("transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    method = start_method(METHODS[settings.method], tasks[0], settings)
    method.restore(folder / f"state_{len(tasks)}", tasks)
    for rule in rules:
        stages = []
        for index, task in enumerate(tasks):
            method.model.set_adapter(task.name)
            merged = copy.deepcopy(method.model).merge_and_unload(merge=rule)
            tested = tasks if index == len(tasks) - 1 else [task]
            correct = {each.name: test(merged, method.tokenizer, each, settings) for each in tested}
            stages.append({"task": task.name, "correct": correct})
        new = {**record, "settings": {**record["settings"], "merge": rule}, "stages": stages}
        new["title"] = f"{record['title']}, merged by {rule}"
        write(folder.with_name(f"{folder.name}-{rule}") / RESULTS, new)
        print(report(new))
