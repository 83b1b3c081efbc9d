"""What the method costs, against its peers: ratios with their spread, and targets (docs/performance.md).

    python examples/speed/benchmark.py                                    # all lines on SmolLM2-135M
    python examples/speed/benchmark.py --only step,penalty --repeats 9    # some lines
    python examples/speed/benchmark.py --growth --device cuda --model meta-llama/Llama-3.2-1B --dtype bfloat16
    python examples/speed/benchmark.py --quick                            # a tiny model: a check that all runs

Both sides of a line run in this process, in turn, after a check that they compute the same; peak memory is taken in
processes apart. The JSON file is written after each line, and the other lines that it has stay.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/: the package `speed`, and tasks.py

from speed import attribution, chains, training
from speed.bench import Bench
from speed.records import Record, growth_figure, read, table, write

LINES: dict[str, Callable[[Bench], list[Record]]] = {
    "step.two": training.step_two,
    "step.hundred": training.step_hundred,
    "penalty.step": training.penalty_step,
    "penalty.loop": training.penalty_loop,
    "attribution.one": partial(attribution.against_captum, line="attribution.one", target=60),
    "attribution.packed": partial(attribution.against_captum, line="attribution.packed", target=25),
    "quadrature": attribution.quadrature,
    "quadrature.time": attribution.quadrature_time,
    "probe": attribution.probe,
    "similarity": chains.similarities,
    "task.stored": partial(training.task, source="stored"),
    "task.current": partial(training.task, source="current"),
    "memory": training.memory,
    "chain.load": chains.load,
    "chain.merge": chains.merge,
    "growth.tasks": training.growth_tasks,
    "growth.rank": training.growth_rank,
    "growth.tokens": partial(attribution.growth, line="tokens"),
    "growth.layers": partial(attribution.growth, line="layers"),
}
# T is `tasks`, or `few_tasks` in penalty.loop, task and growth.rank; a training step has `batch` x `tokens` tokens
SIZES: dict[str, Any] = dict(
    repeats=5, batch=8, tokens=64, rank=8, tasks=100, few_tasks=15, examples=8, prompt=128, steps=20, captum_layers=5,
    vectors=100, neurons=352_256, task_examples=500, task_tokens=130, task_batch=16, probe=16, probe_examples=64,
    reference_steps=512, riemann=(4, 8, 20, 64), gauss_legendre=(4, 8, 16, 20), adaptive=(5, 20, 100),
    growth_tasks=(2, 15, 50, 100), growth_rank=(4, 8, 16, 32), growth_tokens=(16, 64, 128, 256, 512),
    growth_layers=(6, 12, 18, 24, 30),
)  # fmt: skip
QUICK: dict[str, Any] = dict(
    repeats=1, batch=2, tokens=16, tasks=4, few_tasks=3, examples=4, prompt=12, captum_layers=2, vectors=8,
    neurons=3000, task_examples=12, task_tokens=14, task_batch=4, probe=2, probe_examples=4, reference_steps=40,
    riemann=(20,), gauss_legendre=(4,), adaptive=(5,), growth_tasks=(2, 3), growth_rank=(2, 4), growth_tokens=(8, 16),
    growth_layers=(1, 2),
)  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with all sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, examples = parser.add_argument, Path(__file__).resolve().parents[1]
    add("--model", default="smollm2", help="smollm2, or folders or Hub ids of causal models; comma-separated")
    add("--only", help="lines, comma-separated, in full or up to a dot: " + ", ".join(LINES))
    add("--growth", action="store_true", help="also the lines of growth")
    add("--quick", action="store_true", help="a tiny random model and small sizes: a check that all runs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=int, help="of torch, on the CPU")
    add("--repeats", type=int, help="of each short measurement (5)")
    add("--captum-layers", type=lambda text: None if text == "all" else int(text), help="that Captum runs (5), or all")
    add("--captum-rows", type=int, default=16, help="prompts x steps in one of Captum's passes (16)")
    add("--steps", type=int, help="m of Eq. 11 (20)")
    add("--task-examples", type=int, help="training examples of task (500)")
    add("--chain", type=Path, default=Path("runs/demo/chain"), help="trained adapters for quadrature and probe")
    add("--data", type=Path, default=examples / "data", help="the tasks of that chain")
    add("--out", type=Path, default=Path("runs/speed.json"))
    parser.set_defaults(**SIZES)
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def chosen_lines(options: argparse.Namespace) -> list[str]:
    """The lines that `--only` names, else all; SystemExit for a name that is no line's."""
    if options.only is None:
        return [name for name in LINES if options.growth or not name.startswith("growth.")]
    found = {part: [name for name in LINES if f"{name}.".startswith(f"{part}.")] for part in options.only.split(",")}
    if [] in found.values():
        raise SystemExit(f"--only {options.only}: the lines are {', '.join(LINES)}")
    return [name for name in LINES if any(name in names for names in found.values())]


def main(arguments: Sequence[str]) -> int:
    """0 where all lines ran and both sides of each computed the same, whatever the ratios."""
    options, failures = parse(arguments), list[str]()
    names, command = chosen_lines(options), shlex.join(["python", "examples/speed/benchmark.py", *arguments])
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    for model in options.model.split(","):
        with tempfile.TemporaryDirectory(prefix="peft-aso-speed-") as scratch:
            bench = Bench(model, options, Path(scratch))
            for name in names:
                print(f"{time.strftime('%H:%M:%S')} {name} [{bench.label}]", flush=True)
                try:
                    records = LINES[name](bench)
                except Exception as error:  # the other lines still run
                    traceback.print_exc()
                    failures.append(f"{name} [{bench.label}] failed: {error!r}")
                    records = []
                for record in records:
                    print(record, flush=True)
                    if not all(check.same for check in record.sameness):
                        failures.append(f"{record.line} [{bench.label}]: the two sides do not compute the same")
                write(options.out, records, command)
    found = read(options.out)
    print(table(found))
    if any(name.startswith("growth.") for name in names):
        growth_figure(found, options.out.with_suffix(".png"))
    print("\n".join([*failures, f"Written to {options.out}"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
