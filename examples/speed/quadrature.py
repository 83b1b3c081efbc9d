"""The error of the integral (Eq. 10, 11) by number of nodes: Riemann, Gauss-Legendre and adaptive, and bf16."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from peft_aso import AttributionVector, compute_attribution, load_chain, similarity

from .adapters import chain_of
from .batches import Batch
from .bench import Bench
from .figures import save_curves, save_table, text_table
from .paths import layers_of, narrowness, probabilities
from .records import Record
from .texts import text_batches
from .timing import in_turn

# the two models, each with the vectors of all prompts: (2, examples, N)
Vectors = torch.Tensor

_COLUMNS = ("error, median", "error, worst", "error of w, median", "error of w, worst")


def quadrature(bench: Bench) -> list[Record]:
    """How few nodes do what the paper's 20 Riemann steps do."""
    model, pair, source = _pair(bench)
    batches = [batch for parts in _prompts(bench).values() for batch in parts]
    sizes = bench.sizes
    files = _paths(bench, model.eval(), batches)
    bench.say(f"quadrature: the reference, riemann with m = {sizes.reference_steps}, on {source}")
    reference, _ = _vectors(model, pair, batches, sizes.reference_steps, "riemann")
    rows = []
    for rule, counts in (("riemann", sizes.riemann), ("gauss_legendre", sizes.gauss), ("adaptive", sizes.adaptive)):
        for steps in counts:
            bench.say(f"quadrature: {rule}, m = {steps}")
            found, nodes = _vectors(model, pair, batches, steps, rule)
            rows.append({"rule": rule, "m": steps, "nodes": nodes, **_errors(found, reference)})
    rows += _half_precision(bench, model, pair, batches, reference)
    print(text_table(rows))
    files += [save_table(bench.out, "quadrature", rows), *_draw(bench, rows)]
    return [_record(bench, rows, source, [str(path) for path in files])]


def time_of_adaptive(bench: Bench) -> list[Record]:
    """What the fewer nodes save in time: the ones that are added run in smaller batches."""
    model, (_, task), source = _pair(bench)
    batches = text_batches(bench, bench.sizes.examples)
    some = [parts[0] for parts in list(batches.values())[:2]]
    steps, nodes = bench.sizes.steps, []

    def run(rule: str) -> None:
        for batch in some:
            found = compute_attribution(model, batch, adapter=task, steps=steps, quadrature=rule)
            if rule == "adaptive":
                nodes.append(float(found.nodes or 0))

    bench.say("quadrature: the time of adaptive and of riemann")
    ours, theirs = in_turn(lambda: run("adaptive"), lambda: run("riemann"), repeats=bench.sizes.repeats)
    return [
        Record(
            "quadrature.time",
            bench.subject.label,
            f"all layers, m = {steps}, adaptive, {len(some)} batches of {len(some[0]['labels'])} real prompts",
            f"riemann, m = {steps}",
            ours,
            theirs,
            bound="at least",
            notes={"models": source, "nodes": statistics.mean(nodes)},
        )
    ]


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
    steps: int,
    rule: str,
    context: AbstractContextManager[Any] | None = None,
) -> tuple[Vectors, float]:
    """Eq. 11 of both tasks' models on all prompts, up to one factor an example that both models do not share; and the
    nodes that a layer and example took."""

    def of(task: str) -> AttributionVector:
        return AttributionVector.cat(
            [compute_attribution(model, each, adapter=task, steps=steps, quadrature=rule) for each in batches]
        )

    with context or nullcontext():
        found = [of(task) for task in pair]
    nodes = statistics.mean(float(each.nodes or 0) for each in found)
    return torch.stack([each.values for each in found]).double(), nodes


def _errors(found: Vectors, reference: Vectors) -> dict[str, float]:
    """Of the vectors (relative, L2, over both models and all prompts) and of w between the two models."""
    vectors = ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).flatten().tolist()
    w = (similarity(found[0], found[1]) - similarity(reference[0], reference[1])).abs().tolist()
    return dict(zip(_COLUMNS, (statistics.median(vectors), max(vectors), statistics.median(w), max(w)), strict=True))


def _half_precision(
    bench: Bench, model: Any, pair: tuple[str, str], batches: list[Batch], reference: Vectors
) -> list[dict[str, Any]]:
    """m = 20 in bf16: under autocast, and with the model's weights in bf16."""
    if not bench.exact:
        return []
    steps = 20 if 20 in bench.sizes.riemann else bench.sizes.riemann[-1]
    rows: list[dict[str, Any]] = []

    def measure(name: str, context: AbstractContextManager[Any] | None) -> None:
        for rule in ("riemann", "adaptive"):
            bench.say(f"quadrature: {rule}, m = {steps}, {name}")
            found, nodes = _vectors(model, pair, batches, steps, rule, context)
            rows.append({"rule": f"{rule}, {name}", "m": steps, "nodes": nodes, **_errors(found, reference)})

    measure("bf16 autocast", torch.autocast(bench.device.type, dtype=torch.bfloat16))
    model.to(torch.bfloat16)
    measure("model in bf16", None)
    return rows


def enough_nodes(rows: list[dict[str, Any]], column: str, rule: str, steps: int = 20) -> float | None:
    """The fewest nodes of `rule` whose error is no larger than that of `steps` Riemann steps."""
    limit = next(row[column] for row in rows if (row["rule"], row["m"]) == ("riemann", steps))
    good = [row["nodes"] for row in rows if row["rule"] == rule and row[column] <= limit]
    return min(good, default=None)


def _record(bench: Bench, rows: list[dict[str, Any]], source: str, files: list[str]) -> Record:
    enough = {
        rule: {column: enough_nodes(rows, column, rule) for column in _COLUMNS}
        for rule in ("adaptive", "gauss_legendre")
    }
    ours = enough["adaptive"]["error, median"]
    return Record(
        "quadrature",
        bench.subject.label,
        f"adaptive nodes for the median error of 20 Riemann steps, against m = {bench.sizes.reference_steps}",
        "20 Riemann steps",
        [] if ours is None else [ours],
        [20.0],
        bound="at least",
        target=4,
        unit="nodes",
        notes={"models": source, "nodes, by the error that is to be met": enough, "errors": rows, "files": files},
    )


def _draw(bench: Bench, rows: list[dict[str, Any]]) -> list[Path]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = f"= {row['rule']}, m = {row['m']}" if "bf16" in row["rule"] else row["rule"]
        curves.setdefault(name, []).append((row["nodes"], row["error, median"]))
    return save_curves(
        bench.out,
        "quadrature",
        curves,
        title=f"Error of the integral by number of nodes ({bench.subject.label})",
        x="nodes (forward and backward passes) a layer and example",
        y=f"relative L2 error, median (against m = {bench.sizes.reference_steps})",
    )


def _paths(bench: Bench, model: Any, batches: list[Batch]) -> list[Path]:
    """P along the path of the first, a middle and the last layer, all adapters on: a table and a picture."""
    nodes = torch.linspace(0, 1, bench.sizes.path_points, dtype=torch.float64)
    rows, curves = [], {}
    for word, layer in layers_of(model).items():
        p = torch.cat([probabilities(model, batch, layer, nodes) for batch in batches], 1)
        change, part = narrowness(p)
        rows.append({"layer": layer, "change of P, median": change, "part of the path for 90% of it": part})
        for example in range(min(2, p.shape[1])):
            name = f"{word} layer, prompt {example + 1}"
            curves[name] = list(zip(nodes.tolist(), p[:, example].tolist(), strict=True))
    print(text_table(rows))
    title = f"P of the answer with one layer's neurons scaled ({bench.subject.label})"
    pictures = save_curves(bench.out, "path", curves, title=title, x="scale", y="P", logarithmic=False)
    return [save_table(bench.out, "path", rows), *pictures]
