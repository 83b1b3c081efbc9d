"""Where forgetting comes from: what each later adapter's A and B do to the inputs of earlier tasks.

    python examples/continual_benchmark/why.py runs/continual_benchmark/inc_lora-order1-seed0

For a finished run of adapters. First the geometry: how much of an earlier task's inputs a later A takes up, as a part
of what it takes up of its own task's; the same for the whole update B A; and how far the rows of two A and the columns
of two B lie in each other's span, beside what chance gives. Then what it costs: parts of the later adapters are taken
out of the model, every task is tested again, and FM shows how much of the forgetting went with them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from tasks import Task

from continual_benchmark.evaluation import answer
from continual_benchmark.finished import as_table, open_run
from continual_benchmark.methods.directions import layers_with, second_moments
from continual_benchmark.results import Correct, write_json
from continual_benchmark.scores import difference, matrix_of, measures, ways_of
from continual_benchmark.settings import Settings
from continual_benchmark.training import in_bf16

Moments = dict[str, dict[str, torch.Tensor]]  # task, layer
LEADING = 32  # directions of earlier inputs that are taken out


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="why.py", description="Where the forgetting of a run of adapters comes from."
    )
    parser.add_argument("run", type=Path, help="the results folder of a finished run of aso_lora, o_lora or inc_lora")
    parser.add_argument("--no-tests", action="store_true", help="the geometry alone: nothing is taken out and tested")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Look, print, and write `why.json` into the run's folder.

    Raises:
        SystemExit: not a finished run of adapters.
    """
    results, settings, tasks, model, method = open_run(options.run)
    print("Reading the inputs of each task ...", flush=True)
    moments = {task.name: _normed(second_moments(model, task.name, method.few_batches(task))) for task in tasks}
    found: dict[str, Any] = {"geometry": geometry(model, results["tasks"], moments)}
    print(as_table(found["geometry"]))
    if not options.no_tests:
        answers = interventions(model, method.tokenizer, tasks, moments, settings)
        found["taken out"] = [effect(results, title, right) for title, right in answers.items()]
        print(as_table(found["taken out"]))
    write_json(options.run / "why.json", found)
    return found


def geometry(model: Any, names: list[str], moments: Moments) -> list[dict[str, Any]]:
    """One row for each later task and each earlier one, means over layers."""
    rows = []
    for place, new in enumerate(names):
        for old in names[:place]:
            values: dict[str, list[float]] = {}
            for name, layer in layers_with(model, new).items():
                for key, value in _of_layer(layer, old, new, moments[old][name], moments[new][name]).items():
                    values.setdefault(key, []).append(value)
            means = {key: sum(each) / len(each) for key, each in values.items()}
            rows.append({"later": new, "earlier": old, **means})
    return rows


def _of_layer(layer: Any, old: str, new: str, before: torch.Tensor, now: torch.Tensor) -> dict[str, float]:
    a_old, b_old = (part[old].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    a_new, b_new = (part[new].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    update = b_new @ a_new
    return {
        "A on earlier inputs / on its own": energy(a_new, before) / energy(a_new, now),
        "BA on earlier inputs / on its own": energy(update, before) / energy(update, now),
        "rows of A shared": shared(a_old.T, a_new.T),
        "by chance": a_old.shape[0] / a_old.shape[1],
        "columns of B shared": shared(b_old, b_new),
        "by chance, B": b_old.shape[1] / b_old.shape[0],
    }


def energy(matrix: torch.Tensor, moment: torch.Tensor) -> float:
    """Mean squared length of `matrix` x over inputs with this second moment."""
    return float(torch.einsum("ri,ij,rj->", matrix, moment, matrix))


def shared(a: torch.Tensor, b: torch.Tensor) -> float:
    """The part of the span of the columns of `b` that lies in that of `a`: 1 for the same, 0 for orthogonal ones."""
    product = torch.linalg.qr(a).Q.T @ torch.linalg.qr(b).Q
    return float((product**2).sum() / b.shape[1])


def interventions(
    model: Any, tokenizer: Any, tasks: list[Task], moments: Moments, settings: Settings
) -> dict[str, Correct]:
    """By what is taken out of the later adapters: which test examples of each task are answered right."""
    names = [task.name for task in tasks]
    kept = {name: copy.deepcopy(weight.detach()) for name, weight in model.named_parameters() if "lora_" in name}
    found = {}
    for title, change in CHANGES.items():
        print(f"Without {title} ..." if found else "The model as it is ...", flush=True)
        for path, layer in layers_with(model, names[-1]).items():
            for place, new in enumerate(names[1:], start=1):
                change(layer, names[:place], new, [moments[old][path] for old in names[:place]])
        found[title] = {
            task.name: answer(
                model, tokenizer, task, settings.score, settings.max_tokens, in_bf16(settings)
            ).correct(task)
            for task in tasks
        }  # fmt: skip
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in kept:
                    weight.copy_(kept[name])
    return found


def effect(results: dict[str, Any], title: str, right: Correct) -> dict[str, Any]:
    """One row: the accuracies with something taken out; by way of scoring AA and FM, and the paired change of FM.

    FM is counted from the accuracies that the run had at each task's own stage.
    """
    last = {**results["stages"][-1], "correct": right}
    changed = {**results, "stages": [*results["stages"][:-1], last]}
    stages = [stage["correct"] for stage in changed["stages"]]
    row: dict[str, Any] = {"taken out of later adapters": title}
    for way in ways_of(stages):
        matrix = matrix_of(results["tasks"], stages, way)
        if len(row) == 1:
            row |= dict(zip(results["tasks"], matrix[-1], strict=True))
        more, interval = difference(changed, results, way, "FM")
        found = measures(matrix, None)
        row |= {f"AA, {way}": found["AA"], f"FM, {way}": found["FM"], f"change of FM, {way}": [more, *interval]}
    return row


@torch.no_grad()
def _nothing(layer: Any, olds: list[str], new: str, before: list[torch.Tensor]) -> None:
    """The model as it is."""


@torch.no_grad()
def _rows_of_earlier_a(layer: Any, olds: list[str], new: str, before: list[torch.Tensor]) -> None:
    rows = torch.cat([layer.lora_A[old].weight for old in olds])
    _take_out(layer.lora_A[new].weight, rows.T)


@torch.no_grad()
def _inputs_of_earlier(layer: Any, olds: list[str], new: str, before: list[torch.Tensor]) -> None:
    leading = torch.linalg.eigh(sum(before)).eigenvectors[:, -LEADING:]  # type: ignore[call-overload]
    _take_out(layer.lora_A[new].weight, leading)


@torch.no_grad()
def _as_many_at_random(layer: Any, olds: list[str], new: str, before: list[torch.Tensor]) -> None:
    weight = layer.lora_A[new].weight
    generator = torch.Generator().manual_seed(weight.shape[1])
    _take_out(weight, torch.randn(weight.shape[1], LEADING, generator=generator))


@torch.no_grad()
def _columns_of_earlier_b(layer: Any, olds: list[str], new: str, before: list[torch.Tensor]) -> None:
    columns = torch.cat([layer.lora_B[old].weight for old in olds], 1)
    _take_out(layer.lora_B[new].weight.T, columns)


CHANGES = {
    "nothing": _nothing,
    "the rows of earlier A, from A": _rows_of_earlier_a,
    f"{LEADING} leading directions of earlier inputs, from A": _inputs_of_earlier,
    f"{LEADING} random directions, from A": _as_many_at_random,
    "the columns of earlier B, from B": _columns_of_earlier_b,
}


def _take_out(weight: torch.Tensor, directions: torch.Tensor) -> None:
    """From the rows of `weight` their part in the span of the columns of `directions`."""
    basis = torch.linalg.qr(directions.double().to(weight.device)).Q
    weight.copy_(weight - (weight.double() @ basis @ basis.T).to(weight))


def _normed(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: moment / moment.trace() for name, moment in moments.items()}


if __name__ == "__main__":
    main(parse())
