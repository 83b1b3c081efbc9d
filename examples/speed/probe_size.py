"""How large a probe has to be: the standard error of w by the number of examples it is computed on."""

from __future__ import annotations

from typing import Any

import torch

from peft_aso import compute_attribution, load_chain, similarity

from .adapters import chain_of
from .batches import Batch
from .bench import Bench
from .figures import save_curves, save_table, text_table
from .records import Record
from .texts import text_batches

COUNTS = (1, 2, 4, 8, 16, 32, 64)
DRAWS = 2000  # of the mean of numbers
VECTOR_DRAWS = 50  # of the mean of vectors, each ranked anew


def probe_size(bench: Bench) -> list[Record]:
    """w of each example for each pair of a chain, and what a probe of n examples makes of them."""
    model, source = _chain(bench)
    names = [*model.base_model.history, model.base_model.current_task]
    batches = text_batches(bench, bench.sizes.probe_examples, names=names)
    rows: list[dict[str, Any]] = []
    for index, task in enumerate(names[1:], start=1):
        bench.say(f"probe size: the models of {', '.join(names[: index + 1])} on the data of {task}")
        new = _vectors(bench, model, task, batches[task])
        for old in names[:index]:
            rows += _pair(old, task, _vectors(bench, model, old, batches[task]), new)
    print(text_table(rows))
    files = [str(save_table(bench.out, "probe_size", rows)), *map(str, _draw(bench, rows))]
    default = [row["standard error of w"] for row in rows if row["examples"] == bench.sizes.probe]
    return [
        Record(
            "probe",
            bench.subject.label,
            f"standard error of w with a probe of {bench.sizes.probe}, one value a pair of tasks",
            "-",
            default,
            [],
            unit="w",
            notes={"chain": source, "table": rows, "files": files},
        )
    ]


def _chain(bench: Bench) -> tuple[Any, str]:
    if bench.subject.tokenizer is None:
        return chain_of(bench.adapters(), 3).eval(), "three random adapters, random tokens"
    folder = bench.options.chain
    if not folder.is_dir():
        raise SystemExit(f"There is no chain in {folder}: make one with `make demo`, or name one with --chain FOLDER.")
    return load_chain(bench.subject.fresh(), folder), str(folder)


def _vectors(bench: Bench, model: Any, task: str, batches: list[Batch]) -> torch.Tensor:
    """Eq. 11 of one task's model on each example, `(examples, N)`."""
    steps = bench.sizes.steps
    found = [compute_attribution(model, batch, adapter=task, steps=steps, quadrature="adaptive") for batch in batches]
    return torch.cat([vector.values for vector in found])


def _pair(old: str, task: str, before: torch.Tensor, after: torch.Tensor) -> list[dict[str, Any]]:
    """One row for each size of a probe: drawn with replacement from all examples."""
    w = similarity(before, after)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in [each for each in COUNTS if each <= len(w)]:
        chosen = torch.randint(len(w), (DRAWS, count), generator=generator).to(w.device)
        some = chosen[:VECTOR_DRAWS]
        old_means, new_means = (torch.stack([part[pick].mean(0) for pick in some]) for part in (before, after))
        means = similarity(old_means, new_means)
        rows.append(
            {
                "old task": old,
                "task": task,
                "examples": count,
                "w": w.mean().item(),
                "deviation over examples": w.std().item(),
                "standard error of w": w[chosen].mean(1).std().item(),
                "w of the mean vectors": means.mean().item(),
                "standard error of that": means.std().item(),
            }
        )
    return rows


def _draw(bench: Bench, rows: list[dict[str, Any]]) -> list[Any]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = f"{row['old task']} and {row['task']} (w = {row['w']:.2f})"
        curves.setdefault(label, []).append((row["examples"], row["standard error of w"]))
    return save_curves(
        bench.out,
        "probe_size",
        curves,
        title=f"Standard error of w by size of the probe ({bench.subject.label})",
        x="examples in the probe",
        y="standard error of w",
    )
