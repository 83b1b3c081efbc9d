"""Peak memory of training at T = 100 against plain LoRA, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .adapters import task_name
from .bench import Bench
from .records import Record


def peak_memory(bench: Bench) -> list[Record]:
    """The chain's peak without the bytes of its history, against plain LoRA's."""
    tasks, folder = bench.sizes.tasks, bench.adapters()
    chain = [folder.aso(index) for index in range(tasks)]
    repeats = 1 if bench.options.quick else 2
    plain: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    for repeat in range(repeats):
        bench.say(f"memory: plain LoRA and T = {tasks}, in processes of their own, run {repeat + 1} of {repeats}")
        starting = [_start(bench, "plain", [folder.stock(0)])]
        if not bench.options.quick:  # two models at once may be more than a machine holds
            starting[0].wait()
        starting.append(_start(bench, "chain", chain))
        for process, into in zip(starting, (plain, ours), strict=True):
            into.append(_result(process))
    history = ours[0]["history"]
    return [
        Record(
            "memory",
            bench.subject.label,
            f"peak memory of training, T = {tasks}, with penalty, less the history's own {history / 2**20:.1f} MiB",
            "plain LoRA",
            [float(found["peak"] - history) for found in ours],
            [float(found["peak"]) for found in plain],
            target=1.05,
            unit="bytes",
            notes={
                "measured as": ours[0]["source"],
                "history's own bytes": history,
                "peak, T = many": [found["peak"] for found in ours],
                "before the first step, T = many": [found["before"] for found in ours],
                "before the first step, plain": [found["before"] for found in plain],
            },
        )
    ]


def _start(bench: Bench, kind: str, folders: list[Path]) -> subprocess.Popen[str]:
    settings = {
        "kind": kind,
        "folders": [str(path) for path in folders],
        "first": task_name(0),
        "model": bench.subject.name,
        "device": str(bench.device),
        "dtype": str(bench.subject.model.dtype).split(".")[-1],
        "quick": bench.options.quick,
        "threads": torch.get_num_threads(),
        "batch": bench.sizes.batch,
        "tokens": bench.sizes.tokens,
    }
    examples = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "speed.memory_child", json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(examples), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the process printed last.

    Raises:
        RuntimeError: it failed; its own error stands above.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"the process whose memory is measured ended with {process.returncode}: see its error above"
        )
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result
