"""The error of the integral (Eq. 10, 11) by number of nodes: the right Riemann sum, Gauss-Legendre, and bf16."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from peft_aso import compute_attribution, load_chain, similarity

from .adapters import chain_of
from .batches import Batch
from .bench import Bench
from .figures import save_curves, save_table, text_table
from .records import Record
from .texts import text_batches

# the two models, each with the vectors of all prompts: (2, examples, N)
Vectors = torch.Tensor


def quadrature(bench: Bench) -> list[Record]:
    """How many Gauss-Legendre nodes do what the paper's 20 Riemann steps do."""
    model, pair, source = _pair(bench)
    batches = [batch for parts in _prompts(bench).values() for batch in parts]
    sizes = bench.sizes
    bench.say(f"quadrature: the reference, riemann with m = {sizes.reference_steps}, on {source}")
    reference = _vectors(model, pair, batches, sizes.reference_steps, "riemann")
    bench.say(f"quadrature: the second reference, gauss_legendre with {sizes.check_steps} nodes")
    check = _vectors(model, pair, batches, sizes.check_steps, "gauss_legendre")
    rows = []
    for rule, counts in (("riemann", sizes.riemann), ("gauss_legendre", sizes.gauss)):
        for nodes in counts:
            bench.say(f"quadrature: {rule}, {nodes} nodes")
            found = _vectors(model, pair, batches, nodes, rule)
            rows.append({"rule": rule, "nodes": nodes, **_errors(found, reference, check)})
    rows += _half_precision(bench, model, pair, batches, reference, check)
    print(text_table(rows))
    files = [str(save_table(bench.out, "quadrature", rows))]
    files += [str(path) for path in _draw(bench, rows, reference, check)]
    return [_record(bench, rows, reference, check, source, files)]


def _pair(bench: Bench) -> tuple[Any, tuple[str, str], str]:
    """A model with at least two tasks, the names of its last two, and where it comes from."""
    folder = bench.options.chain
    if folder.is_dir() and bench.subject.tokenizer is not None:
        model, source = load_chain(bench.subject.fresh(), folder), f"the last two tasks of {folder}"
    else:
        model, source = chain_of(bench.adapters(), 2).eval(), "two random adapters"
    last = model.base_model.current_task
    return model, ([last, *model.base_model.history][-1], last), source


def _prompts(bench: Bench) -> dict[str, list[Batch]]:
    batches = text_batches(bench, bench.sizes.quadrature_examples)
    return dict(list(batches.items())[:4])


def _vectors(
    model: Any,
    pair: tuple[str, str],
    batches: list[Batch],
    nodes: int,
    rule: str,
    context: AbstractContextManager[Any] | None = None,
) -> Vectors:
    """Eq. 11 of both tasks' models on all prompts, up to one factor an example that both models do not share."""

    def of(task: str) -> Vectors:
        parts = [compute_attribution(model, each, adapter=task, steps=nodes, quadrature=rule) for each in batches]
        return torch.cat([part.values for part in parts])

    with context or nullcontext():
        return torch.stack([of(task) for task in pair]).double()


def _errors(found: Vectors, reference: Vectors, check: Vectors) -> dict[str, float]:
    """Of the vectors (relative, L2, over both models and all prompts) and of w between the two models."""

    def of_vectors(against: Vectors) -> list[float]:
        return ((found - against).norm(dim=-1) / against.norm(dim=-1)).flatten().tolist()

    def of_w(against: Vectors) -> list[float]:
        return (similarity(found[0], found[1]) - similarity(against[0], against[1])).abs().tolist()

    return {
        "error, median": statistics.median(of_vectors(reference)),
        "error, worst": max(of_vectors(reference)),
        "error against the second reference, median": statistics.median(of_vectors(check)),
        "error of w, median": statistics.median(of_w(reference)),
        "error of w, worst": max(of_w(reference)),
        "error of w against the second reference, median": statistics.median(of_w(check)),
    }


def _half_precision(
    bench: Bench, model: Any, pair: tuple[str, str], batches: list[Batch], reference: Vectors, check: Vectors
) -> list[dict[str, Any]]:
    """m = 20 in bf16: under autocast, and with the model's weights in bf16."""
    if not bench.exact:
        return []
    steps = 20 if 20 in bench.sizes.riemann else bench.sizes.riemann[-1]
    rows: list[dict[str, Any]] = []
    bench.say(f"quadrature: riemann, {steps} nodes, bf16 autocast")
    autocast = torch.autocast(bench.device.type, dtype=torch.bfloat16)
    found = _vectors(model, pair, batches, steps, "riemann", autocast)
    rows.append({"rule": "riemann, bf16 autocast", "nodes": steps, **_errors(found, reference, check)})
    bench.say(f"quadrature: riemann, {steps} nodes, model in bf16")
    found = _vectors(model.to(torch.bfloat16), pair, batches, steps, "riemann")
    rows.append({"rule": "riemann, model in bf16", "nodes": steps, **_errors(found, reference, check)})
    return rows


def enough_nodes(rows: list[dict[str, Any]], column: str, steps: int = 20) -> int | None:
    """The fewest Gauss-Legendre nodes whose error is no larger than that of `steps` Riemann steps."""
    limit = next(row[column] for row in rows if (row["rule"], row["nodes"]) == ("riemann", steps))
    good = [row["nodes"] for row in rows if row["rule"] == "gauss_legendre" and row[column] <= limit]
    return min(good, default=None)


def _record(
    bench: Bench, rows: list[dict[str, Any]], reference: Vectors, check: Vectors, source: str, files: list[str]
) -> Record:
    column = "error, median"
    columns = [column, "error, worst", "error against the second reference, median", "error of w, median"]
    enough = enough_nodes(rows, column)
    between = _errors(check, reference, reference)[column]
    return Record(
        "quadrature",
        bench.subject.label,
        f"Gauss-Legendre nodes for the median error of 20 Riemann steps, against m = {bench.sizes.reference_steps}",
        "20 Riemann steps",
        [] if enough is None else [float(enough)],
        [20.0],
        bound="at least",
        target=4,
        unit="nodes",
        notes={
            "models": source,
            "nodes, by the error that is to be met": {name: enough_nodes(rows, name) for name in columns},
            "difference of the two references, median": between,
            "errors": rows,
            "files": files,
        },
    )


def _draw(bench: Bench, rows: list[dict[str, Any]], reference: Vectors, check: Vectors) -> list[Any]:
    column = "error against the second reference, median"
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "bf16" in row["rule"]:
            curves[f"= {row['rule']}, m = {row['nodes']}"] = [(1, row[column])]
        else:
            curves.setdefault(row["rule"], []).append((row["nodes"], row[column]))
    between = _errors(reference, check, check)["error, median"]
    curves[f"= riemann, m = {bench.sizes.reference_steps}"] = [(1, between)]
    return save_curves(
        bench.out,
        "quadrature",
        curves,
        title=f"Error of the integral by number of nodes ({bench.subject.label})",
        x="nodes (forward and backward passes)",
        y=f"relative L2 error, median (against {bench.sizes.check_steps} Gauss-Legendre nodes)",
    )
