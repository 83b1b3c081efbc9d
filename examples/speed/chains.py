"""A chain of 100 adapters: loading it, merging it, and comparing the attribution vectors of 100 tasks."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import spearmanr

from peft_aso import load_chain, save_chain
from peft_aso.attribution import similarity_matrix

from .bench import Bench, logits, task_name
from .records import Record, Sameness, in_turn, relative, seconds


def load(bench: Bench) -> list[Record]:
    """`load_chain` of a folder that `save_chain` wrote, against `load_adapter` one after another."""
    tasks, saved, found = bench.options.tasks, bench.scratch / "saved", dict[str, Any]()
    save_chain(bench.chain(tasks), saved)
    for index in range(tasks):
        bench.adapter(index, stock=True)

    def ours() -> None:
        found["ours"] = load_chain(found["ours"], saved, trainable=True)

    def stock() -> None:
        found["stock"] = bench.stock(range(tasks), found["stock"], active=False)

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(1, bench.options.repeats // 2)):
        found |= {"ours": bench.fresh(), "stock": bench.fresh()}
        times[0].append(seconds(ours))
        times[1].append(seconds(stock))
    found["stock"].base_model.set_adapter([task_name(index) for index in range(tasks)])
    sides = (found["ours"].named_parameters(), found["stock"].named_parameters())
    mine, theirs = ({name: value for name, value in side if "lora_" in name} for side in sides)
    checks = [
        Sameness("matrices that only one side has", len(set(mine) ^ set(theirs)), 0.0),
        Sameness("matrices, against the largest", max(relative(mine[name], theirs[name]) for name in mine), 0.0),
        bench.same_logits(found["ours"], found["stock"], "all tasks active"),
    ]
    more: Any = {"bound": "at least", "target": 5, "sameness": checks}
    return [bench.record("chain.load", f"load_chain of {tasks} adapters", "load_adapter of each", *times, **more)]


def merge(bench: Bench) -> list[Record]:
    """`merge_adapter` of all tasks against one product a module of B and A that are stacked already."""
    tasks, batch = bench.options.tasks, bench.step_batch()
    model = bench.chain(tasks).eval()
    parameters, names, products = dict(model.named_parameters()), [task_name(index) for index in range(tasks)], {}
    for place in [name.split(".lora_A.")[0] for name in parameters if f".lora_A.{names[0]}." in name]:
        scaling, weight = model.get_submodule(place).scaling, f"{place}.base_layer.weight"
        up = torch.cat([parameters[f"{place}.lora_B.{name}.weight"] * scaling[name] for name in names], 1)
        down = torch.cat([parameters[f"{place}.lora_A.{name}.weight"] for name in names], 0)
        products[weight] = (parameters[weight].detach().clone(), up.detach(), down.detach())

    @torch.no_grad()
    def product() -> None:
        for weight, up, down in products.values():
            if weight.dtype == down.dtype:
                weight.addmm_(up, down)
            else:
                weight += (up @ down).to(weight.dtype)

    before = logits(model, batch)
    product()
    model.base_model.merge_adapter()
    merged = dict(model.named_parameters())
    apart = max(relative(merged[name], product_of[0]) for name, product_of in products.items())
    checks = [Sameness("merged weights, against the largest", apart, 1e-6 if bench.exact else 1e-2)]
    checks.append(bench.same(logits(model, batch), before, "logits, merged against active"))
    model.base_model.unmerge_adapter()
    checks.append(bench.same(logits(model, batch), before, "logits, after unmerging"))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(bench.options.repeats):
        times[0].append(seconds(model.base_model.merge_adapter))
        model.base_model.unmerge_adapter()
        times[1].append(seconds(product))
    what, against = f"merge_adapter of {tasks} adapters", "one product a module, B and A stacked beforehand"
    return [bench.record("chain.merge", what, against, *times, target=1.5, sameness=checks)]


def similarities(bench: Bench) -> list[Record]:
    """Spearman's w of all pairs of vectors, against one sort of each."""
    count, neurons, generator = bench.options.vectors, bench.options.neurons, torch.Generator().manual_seed(0)
    vectors = torch.randn(count, neurons, generator=generator) + torch.randn(neurons, generator=generator)
    vectors[1].clamp_(min=0)  # ties, as a ReLU leaves them
    values, vectors = vectors.numpy(), vectors.to(bench.model.device)
    found, pairs = similarity_matrix(vectors), ((0, 1), (0, -1), (1, -1), (count // 2, -1))
    apart = max(abs(found[i, j].item() - spearmanr(values[i], values[j]).statistic) for i, j in pairs)
    checks = [Sameness("w, against scipy.stats.spearmanr", float(apart), 1e-6)]
    sides = (lambda: similarity_matrix(vectors), lambda: [torch.sort(vector) for vector in vectors])
    times, what = in_turn(*sides, repeats=bench.options.repeats), f"w of all pairs, {count} x {neurons:,} neurons"
    return [bench.record("similarity", what, "torch.sort of each", *times, target=2, sameness=checks)]
