"""What psi comes to under each reading of the paper, on the chain of a finished run of adapters. Nothing is trained.

    python examples/continual_benchmark/psi.py runs/continual_benchmark/aso_lora-order1-seed0

The paper leaves open what the model of a task is, how examples are put together and whether scores
count with their sign. Here, for each task and each earlier one, is psi = 1 - w on the later one's first training
examples, as it is at that task's end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from tasks import Task

from continual_benchmark.finished import Finished, as_table, open_run
from continual_benchmark.results import write_json
from peft_aso import AttributionVector, compute_attribution, similarity

MODELS = ("cumulative", "task")
AGGREGATIONS = ("per_example", "mean")
SIGNS = (False, True)
SIMILARITIES = ("spearman", "pearson", "cosine")
Vectors = dict[str, AttributionVector]  # of each task's model, on the same examples


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="psi.py", description="psi under each reading of the paper.")
    parser.add_argument("run", type=Path, help="the results folder of a finished run of aso_lora, o_lora or inc_lora")
    parser.add_argument(
        "--examples",
        type=int,
        default=16,
        metavar="N",
        choices=range(1, 65),
        help="of each task that are looked at, 1 to 64",
    )
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Look, print, and write `psi.json` into the run's folder: one row a reading, one number a pair of tasks.

    Raises:
        SystemExit: not a finished run of adapters.
    """
    run = open_run(options.run)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, task in enumerate(run.tasks[1:], start=1):
        names = [each.name for each in run.tasks[: place + 1]]
        for of in MODELS:
            vectors = attribute(run, task, names, of == "task", options.examples)
            for way in itertools.product(AGGREGATIONS, SIGNS, SIMILARITIES):
                reading = dict(zip(("aggregation", "absolute", "similarity"), way, strict=True))
                row = rows.setdefault((of, *way), {"attribution_model": of, **reading})
                for earlier in names[:-1]:
                    row[f"{task.name} to {earlier}"] = 1 - w_of(vectors[earlier], vectors[task.name], *way)
    found = list(rows.values())
    print(as_table(found))
    write_json(options.run / "psi.json", found)
    return found


def attribute(run: Finished, task: Task, names: list[str], alone: bool, examples: int) -> Vectors:
    """The vectors of these tasks' models on the first examples of `task`: with their histories, or alone."""
    batches = run.method.few_batches(replace(task, train=task.train[:examples]))
    bar = tqdm(names, desc=f"{task.name}, {'alone' if alone else 'with history'}", unit="model", leave=False)
    return {
        name: AttributionVector.cat(
            [
                compute_attribution(run.model, batch, adapter=name, alone=alone, quadrature="adaptive")
                for batch in batches
            ]
        )
        for name in bar
    }


def w_of(old: AttributionVector, new: AttributionVector, aggregation: str, absolute: bool, method: str) -> float:
    """w of Eq. 13: the mean over examples, or of the mean vectors."""
    both = [each.values if aggregation == "per_example" else each.mean_vector() for each in (old, new)]
    if absolute:
        both = [values.abs() for values in both]
    return float(similarity(*both, method).mean())


if __name__ == "__main__":
    main(parse())
