"""What folding the history costs in accuracy on a bfloat16 base, where the folded weight is rounded."""

from __future__ import annotations

from typing import Any

import torch

from peft_aso import load_chain

from .bench import Bench
from .figures import save_table, text_table
from .records import Record
from .steps import logits_of, step_batch
from .texts import text_batches

FORMS = ("stacked", "folded")


def folding(bench: Bench) -> list[Record]:
    """Error of the logits for each form, on a chain of trained adapters and on random ones."""
    rows: list[dict[str, Any]] = []
    for label, sources, batch in _chains(bench):
        bench.say(f"folding in bfloat16: {label}")
        rows += [{"chain": label, **row} for row in _errors(bench, sources, batch)]
    print(text_table(rows))
    files = [str(save_table(bench.out, "folding", rows))]
    column = "error, as a part of what the history does"
    return [
        Record(
            "folding",
            f"{bench.subject.name}, bfloat16",
            "error of the logits with the history folded, as a part of what the history does to them",
            "the same with the history stacked beside the base weight",
            [row[column] for row in rows if row["form"] == "folded"],
            [row[column] for row in rows if row["form"] == "stacked"],
            unit="of the history's effect",
            notes={"errors": rows, "files": files},
        )
    ]


def _chains(bench: Bench) -> list[tuple[str, Any, dict[str, torch.Tensor]]]:
    """A label, what `load_chain` takes, and what the model is run on."""
    adapters, found = bench.adapters(), []
    if bench.options.chain.is_dir() and bench.subject.tokenizer is not None:
        batches = text_batches(bench, 8)
        last = list(batches.values())[-1][0]
        found.append((f"trained, {bench.options.chain}", bench.options.chain, last))
    for tasks in (2, bench.sizes.loop_tasks, bench.sizes.tasks):
        sources = [adapters.aso(index) for index in range(tasks)]
        found.append((f"random, T = {tasks}", sources, step_batch(bench)))
    return found


def _errors(bench: Bench, sources: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Against float32 with the base weights as bfloat16 has them, so that only what is computed differs."""
    rounded = bench.subject.fresh().to(torch.bfloat16)
    exact_model = load_chain(bench.subject.fresh().to(torch.bfloat16).float(), sources)
    exact = logits_of(exact_model, batch).double()
    task = exact_model.base_model.current_task
    with exact_model.base_model.only(task):
        effect = exact - logits_of(exact_model, batch).double()
    rows = [_error("folded, computed in float32", _weights_rounded(exact_model, batch), exact, effect)]
    del exact_model
    model = load_chain(rounded, sources)
    for form in FORMS:
        model.peft_config[task].history_form = form
        model.set_adapter(task)
        rows.append(_error(form, logits_of(model, batch), exact, effect))
    return rows


def _weights_rounded(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits with everything merged and only the weights rounded: what folding adds to bfloat16's own error."""
    model.merge_adapter()
    for layer in model.base_model.lora_layers().values():
        layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16().float()
    return logits_of(model, batch)


def _error(form: str, found: torch.Tensor, exact: torch.Tensor, effect: torch.Tensor) -> dict[str, Any]:
    difference = found.double() - exact
    return {
        "form": form,
        "error, as a part of what the history does": (difference.norm() / effect.norm()).item(),
        "error, as a part of the logits": (difference.norm() / exact.norm()).item(),
        "same most likely token": ((difference + exact).argmax(-1) == exact.argmax(-1)).double().mean().item(),
    }
