"""Records of runs: `results.json` in each run's folder, and many finished ones in one compressed file.

    python examples/continual_benchmark/records.py docs/results/continual.jsonl.xz runs/continual_benchmark

adds the finished runs of a folder to the file. A record is a dict:

    name        the run's folder, after that of its group in the file ("orders/inc_lora-order1-seed0")
    title       the method
    tasks       their names, in the order learned
    settings    what decides the results, by the names of run.py's options
    stages      one dict a task: `task`, `correct` (by task and way of scoring one character a test question, 1 for a
                right answer), `log` (by name one value a step), `seconds`, and of adapters `psi` and `similarity`
    alone       by task and way, the same for each task learned alone; null without that
"""

from __future__ import annotations

import json
import lzma
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RESULTS = "results.json"


def read_records(paths: Sequence[Path], only: Sequence[str] = ("*",)) -> list[Record]:
    """The finished runs in these compressed files and folders whose names match one of the patterns.

    Raises:
        SystemExit: there is none.
    """
    found: list[Record] = []
    for path in paths:
        if path.is_file():
            with lzma.open(path, "rt", encoding="utf-8") as file:
                found += [json.loads(line) for line in file]
        for each in sorted(path.rglob(RESULTS)):
            name = f"{each.parent.parent.name}/{each.parent.name}"
            found.append({"name": name, **json.loads(each.read_text(encoding="utf-8"))})
    finished = [
        record for record in found
        if len(record["stages"]) == len(record["tasks"]) and any(fnmatch(record["name"], each) for each in only)
    ]  # fmt: skip
    if not finished:
        raise SystemExit(f"No finished run in {', '.join(map(str, paths))} matches {' '.join(only)}.")
    return sorted(finished, key=lambda record: str(record["name"]))


def add_records(file: Path, folders: Sequence[Path]) -> list[Record]:
    """Add the finished runs of some folders to a compressed file; a run that is there by its name is replaced."""
    old = read_records([file]) if file.is_file() else []
    by_name = {record["name"]: record for record in [*old, *read_records(folders)]}
    records = [by_name[name] for name in sorted(by_name)]
    new = file.with_suffix(".new")
    with lzma.open(new, "wt", preset=9 | lzma.PRESET_EXTREME, encoding="utf-8") as packed:
        for record in records:
            print(json.dumps(_rounded(record), separators=(",", ":")), file=packed)
    os.replace(new, file)
    return records


def _rounded(value: Any) -> Any:
    """Floats with four digits, which are what logs are worth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    target, *sources = map(Path, sys.argv[1:])
    print(f"{target} has {len(add_records(target, sources))} runs.")
