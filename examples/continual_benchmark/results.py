"""A run on disk: its settings, one file a stage, the state to go on from, and at the end the results."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .settings import Settings, completed

Correct = dict[str, dict[str, list[bool]]]  # task, way of scoring, test example
TRAINED = "trained.json"  # in a state's folder


class RunFolder:
    """The folder of one run, this process's alone until the end of a `with`.

    Raises:
        SystemExit: another process is at this run, or the folder holds a run of other settings, which is left as it
            is.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise SystemExit(f"{path}: another process is at this run. Wait for it, or give --name.") from None
        file = path / "settings.json"
        there = read_json(file)
        if there is not None:
            there = completed(there)
            other = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
            if other:
                changes = ", ".join(
                    f"{name} {there.get(name)!r}, not {settings.get(name)!r}" for name in sorted(other)
                )
                self._lock.release()
                raise SystemExit(
                    f"{path} holds a run of other settings ({changes}). It stays as it is: give this run a folder of "
                    "its own with --name, or move that one away."
                )
        write_json(file, settings)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def done(self) -> int:
        """How many stages are finished."""
        return next(number for number in itertools.count() if not self._stage(number).is_file())

    def stages(self) -> list[dict[str, Any]]:
        """What the finished stages came to, in order."""
        return [read_json(self._stage(number)) for number in range(self.done)]

    def add_state(self, save: Callable[[Path], None], trained: dict[str, Any]) -> None:
        """Write the state after the next stage's training, and what is known of that stage before its tests."""
        state, new = self.state(self.done), self.path / "state.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save(new)
        write_json(new / TRAINED, trained)
        shutil.rmtree(state, ignore_errors=True)
        os.replace(new, state)

    def trained(self) -> dict[str, Any] | None:
        """What is known of a stage that was trained and then stopped before its tests were through."""
        return read_json(self.state(self.done) / TRAINED)

    def add_stage(self, stage: dict[str, Any]) -> None:
        """Write one more stage, whose state is there; the state of the one before goes."""
        number = self.done
        write_json(self._stage(number), stage)
        if number > 0:
            shutil.rmtree(self.state(number - 1), ignore_errors=True)

    def state(self, number: int) -> Path:
        """The folder with the state after stage `number`."""
        return self.path / f"state_{number + 1:02d}"

    def results(self) -> dict[str, Any] | None:
        """The results of a finished run."""
        return read_json(self.path / "results.json")

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results; the last state stays."""
        write_json(self.path / "results.json", results)

    def _stage(self, number: int) -> Path:
        return self.path / "stages" / f"{number + 1:02d}.json"


def folder_of(settings: Settings, order: str) -> Path:
    """Where a run goes: `--name`, or its method, order and seed."""
    scope = "-full" if settings.scope == "full" else ""
    shown = f"order{order}" if order.isdigit() else order
    return settings.out / (settings.name or f"{settings.method}{scope}-{shown}-seed{settings.seed}")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")  # runs beside each other share some folders
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)
