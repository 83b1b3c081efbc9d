"""A chain of 100 adapters: loading it against stock PEFT, merging it against one product of the stacked ranks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peft_aso import load_chain, save_chain

from .adapters import all_active, chain_of, lora_weights, stock_loaded, task_name
from .bench import Bench
from .records import Record, Sameness
from .steps import logits_of, same_logits, step_batch
from .timing import relative, repeated, seconds


def loading(bench: Bench) -> list[Record]:
    """`load_chain` of a folder that `save_chain` wrote, against `load_adapter` one after another."""
    tasks, folder = bench.sizes.tasks, bench.adapters()
    bench.say(f"loading, T = {tasks}: writing the chain")
    saved = bench.scratch / f"chain-{bench.subject.name.replace('/', '_')}"
    save_chain(chain_of(folder, tasks), saved)
    for index in range(tasks):
        folder.stock(index)
    repeats = max(1, bench.sizes.repeats // 2)
    ours: list[float] = []
    theirs: list[float] = []
    checks: list[Sameness] = []
    for repeat in range(repeats):
        bench.say(f"loading, T = {tasks}: run {repeat + 1} of {repeats}")
        chain, taken = _timed(load_chain, bench.subject.fresh(), saved, trainable=True)
        ours.append(taken)
        stock, taken = _timed(stock_loaded, folder, tasks, bench.subject.fresh())
        theirs.append(taken)
        if not repeat:
            checks = _same_chain(bench, chain, all_active(stock, tasks))
    reading = repeated(lambda: read_files(saved), bench.sizes.repeats)
    share = statistics.median(reading) / statistics.median(ours)
    return [
        Record(
            "chain.load",
            bench.subject.label,
            f"load_chain of {tasks} adapters (rank {bench.sizes.rank}), hashes checked",
            "stock PEFT: from_pretrained, then load_adapter one after another",
            ours,
            theirs,
            bound="at least",
            target=5,
            sameness=checks,
            notes={"reading the files alone, seconds": reading, "reading the files, share of ours": share},
        )
    ]


def _timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    found: list[Any] = []
    taken = seconds(lambda: found.append(function(*args, **kwargs)))
    return found[0], taken


def read_files(chain: Path) -> int:
    """All that is on disk, into memory; bytes of the tensors."""
    size = 0
    for folder in sorted(path.parent for path in chain.glob("*/adapter_config.json")):
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        size += sum(tensor.clone().nbytes for tensor in tensors.values())  # mapped, until something reads them
    return size


def _same_chain(bench: Bench, ours: Any, stock: Any) -> list[Sameness]:
    mine, theirs = lora_weights(ours), lora_weights(stock)
    names = set(mine) ^ set(theirs)
    largest = max((mine[name].float() - theirs[name].float()).abs().max().item() for name in set(mine) & set(theirs))
    return [
        Sameness("adapter matrices that only one side has", float(len(names)), 0.0),
        Sameness("adapter matrices, largest difference", largest, 0.0),
        same_logits(bench, ours, stock, step_batch(bench), "all tasks active"),
    ]


def merging(bench: Bench) -> list[Record]:
    """`merge_adapter` of all tasks against one product a module of ranks that are stacked already."""
    tasks = bench.sizes.tasks
    bench.say(f"merging, T = {tasks}: making the chain, comparing")
    model = chain_of(bench.adapters(), tasks).eval()
    product, weights, stacking = stacked_product(model, tasks)
    checks = _same_merge(bench, model, product, weights)
    bench.say(f"merging, T = {tasks}: timing")
    ours: list[float] = []
    theirs: list[float] = []
    stacked: list[float] = []
    for _ in range(bench.sizes.repeats + 1):
        ours.append(seconds(model.base_model.merge_adapter))
        model.base_model.unmerge_adapter()
        theirs.append(seconds(product))
        stacked.append(seconds(stacking) + theirs[-1])
    return [
        Record(
            "chain.merge",
            bench.subject.label,
            f"merge_adapter of {tasks} adapters (rank {bench.sizes.rank})",
            "W += B A, one product a module, B and A stacked beforehand",
            ours[1:],
            theirs[1:],
            target=1.5,
            sameness=checks,
            notes={
                "the product with the stacking of B and A in it, seconds": stacked[1:],
                "ratio to that": statistics.median(a / b for a, b in zip(ours[1:], stacked[1:], strict=True)),
            },
        )
    ]


def stacked_product(model: Any, tasks: int) -> tuple[Callable[[], None], dict[str, torch.Tensor], Callable[[], None]]:
    """A function that adds the sum of all adapters to copies of the base weights, these copies by module, and a
    function that stacks what the product needs, and throws it away."""
    parameters = dict(model.named_parameters())
    copies: dict[str, torch.Tensor] = {}
    pairs, parts = [], []
    for name in [name for name in parameters if f".lora_A.{task_name(0)}." in name]:
        place = name.split(".lora_A.")[0]
        scaling = model.get_submodule(place).scaling
        downs = [parameters[f"{place}.lora_A.{task_name(t)}.weight"] for t in range(tasks)]
        ups = [parameters[f"{place}.lora_B.{task_name(t)}.weight"] * scaling[task_name(t)] for t in range(tasks)]
        parts.append((ups, downs))
        copies[place] = parameters[f"{place}.base_layer.weight"].detach().clone()
        pairs.append((copies[place], torch.cat(ups, 1).detach(), torch.cat(downs, 0).detach()))

    @torch.no_grad()
    def product() -> None:
        for weight, up, down in pairs:
            if weight.dtype == down.dtype:
                weight.addmm_(up, down)
            else:
                weight += (up @ down).to(weight.dtype)

    @torch.no_grad()
    def stacking() -> None:
        for ups, downs in parts:
            torch.cat(ups, 1), torch.cat(downs, 0)

    return product, copies, stacking


def _same_merge(
    bench: Bench, model: Any, product: Callable[[], None], copies: dict[str, torch.Tensor]
) -> list[Sameness]:
    """Both sums against each other; and what is left after unmerging against what was there."""
    batch = step_batch(bench)
    before = logits_of(model, batch)
    product()
    model.base_model.merge_adapter()
    weights = dict(model.named_parameters())
    differences = [relative(weights[f"{place}.base_layer.weight"], copy) for place, copy in copies.items()]
    merged = relative(logits_of(model, batch), before)
    model.base_model.unmerge_adapter()
    return [
        Sameness("merged weights, against the largest", max(differences), 1e-6 if bench.exact else 1e-2),
        Sameness("logits, merged against active", merged, bench.logits_limit),
        Sameness("logits, after unmerging", relative(logits_of(model, batch), before), bench.logits_limit),
    ]
