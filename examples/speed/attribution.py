"""Attribution: all layers against Captum, its growth, the error of the integral, and the standard error of w."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from captum.attr import IntegratedGradients
from tasks import AnswerDataset, read_task  # examples/tasks.py
from transformers import AutoConfig, DataCollatorForSeq2Seq

from peft_aso import AttributionVector, compute_attribution, load_chain, similarity
from peft_aso.attribution import NeuronLayer, find_neurons

from .bench import Batch, Bench
from .records import Record, Sameness, in_turn, relative, seconds


def captum_layer(bench: Bench, batch: Batch, layer: NeuronLayer, needed_only: bool) -> torch.Tensor:
    """Eq. 11 for the neurons of one layer by Captum, `(B, size)`: the model runs from its input to its output, with
    scaled neurons in the place of the layer's own.

    Args:
        needed_only: have the model compute logits at the answers' positions only.
    """
    targets = batch["labels"].roll(-1, 1)  # position p predicts the token at p + 1; no label is first
    scaled, settings = targets != -100, {"use_cache": False}
    if needed_only:
        settings["logits_to_keep"] = scaled.any(0).nonzero()[:, 0]
        targets = targets[:, settings["logits_to_keep"]]

    def probability(copies: int, hook: Any) -> torch.Tensor:
        """Eq. 9 of each row, with `copies` of the batch and a hook on the layer."""
        ids, mask, expected = (x.repeat(copies, 1) for x in (batch["input_ids"], batch["attention_mask"], targets))
        handle = layer.module.register_forward_pre_hook(hook)
        logits = bench.model(input_ids=ids, attention_mask=mask, **settings).logits
        handle.remove()
        rows, places = (expected != -100).nonzero(as_tuple=True)
        logs = logits[rows, places].float().log_softmax(-1).gather(1, expected[rows, places][:, None])[:, 0]
        return logs.new_zeros(len(ids)).index_add(0, rows, logs).exp()

    def patched(neurons: torch.Tensor) -> torch.Tensor:
        copies = len(neurons) // len(scaled)
        where = scaled.repeat(copies, 1)[:, :, None]
        return probability(copies, lambda _, args: (torch.where(where, neurons, args[0]),))

    values: list[torch.Tensor] = []
    with torch.no_grad():
        probability(1, lambda _, args: values.append(args[0].detach()))
    more: Any = {"n_steps": bench.options.steps, "method": "riemann_right"}
    scores = IntegratedGradients(patched).attribute(values[0], internal_batch_size=bench.options.captum_rows, **more)
    return (scores * scaled[:, :, None]).sum(1).detach()


def against_captum(bench: Bench, line: str, target: float) -> list[Record]:
    """All layers, right Riemann sum, against Captum on some of the layers, evenly spread, times layers / some: a layer
    costs Captum a forward pass and a backward pass down to it, which is linear in its depth."""
    options, model = bench.options, bench.model
    answers = [1 + (index // 2) % 4 if line.endswith("packed") else 1 for index in range(options.examples)]
    batch, layers, scores = bench.prompts(options.prompt, answers), find_neurons(model), dict[str, torch.Tensor]()
    factor = len(layers) / min(options.captum_layers or len(layers), len(layers))
    chosen = [layers[int((index + 0.5) * factor)] for index in range(round(len(layers) / factor))]

    def run() -> AttributionVector:
        return compute_attribution(model, batch, steps=options.steps)

    def captum(needed_only: bool) -> float:
        return factor * seconds(
            lambda: scores.update({each.name: captum_layer(bench, batch, each, needed_only) for each in chosen})
        )

    vector = run()  # the engine checks itself once a model
    ours = in_turn(run, repeats=options.repeats, warm_up=0)[0]
    needed, taken = captum(needed_only=True), captum(needed_only=False)
    ours += in_turn(run, repeats=options.repeats, warm_up=0)[0]
    notes = {"layers that Captum ran": len(chosen), "ratio with logits_to_keep": needed / statistics.median(ours)}
    columns = [vector.scores[:, start:stop] for name, start, stop in vector.layout if name in scores]
    mine, theirs = torch.cat(columns, 1), torch.cat(list(scores.values()), 1)
    worst = max(relative(a, b) for a, b in zip(mine, theirs, strict=True))
    checks = [bench.same(mine, theirs, "scores", 1e-5)]
    checks.append(Sameness("scores, against the largest of the same example", worst, 1e-4 if bench.exact else 0.3))
    what = f"attribution, {len(layers)} layers, m = {options.steps}, {options.examples} x {options.prompt} tokens, "
    what += f"answers of {'one token' if max(answers) == 1 else '1 to 4 tokens'}"
    more: Any = {"bound": "at least", "target": target, "sameness": checks, "notes": notes}
    return [bench.record(line, what, "Captum, layer by layer", ours, [taken], **more)]


def growth(bench: Bench, line: str) -> list[Record]:
    """Ours by length of the prompt, or by number of layers, with random weights and else the same config."""
    options, records = bench.options, []
    for x in options.growth_tokens if line == "tokens" else options.growth_layers:
        model, tokens = bench.model, x
        if line == "layers":
            settings = {**model.config.to_dict(), "num_hidden_layers": x, "layer_types": None}
            model = (
                type(model)(AutoConfig.for_model(**settings))
                .to(model.device, model.dtype)
                .eval()
                .requires_grad_(False)
            )
            tokens = options.prompt
        batch, run = bench.prompts(tokens, [1] * options.examples), partial(compute_attribution, model)
        times = in_turn(partial(run, batch, steps=options.steps), repeats=options.repeats)
        records.append(bench.record(f"growth.{line}", f"attribution, {x} {line}", "", *times, x=x))
    return records


def demo_chain(bench: Bench) -> tuple[Any, list[str]]:
    """The chain of `--chain` and its tasks, oldest first; with --quick three random adapters."""
    folder = bench.options.chain
    if not bench.options.quick and not folder.is_dir():
        raise FileNotFoundError(f"There is no chain in {folder}: `make demo` makes one, or give --chain FOLDER.")
    model = bench.chain(3).eval() if bench.options.quick else load_chain(bench.fresh(), folder)
    return model, [*model.base_model.history, model.base_model.current_task]


def prompts_of(bench: Bench, task: str, count: int) -> list[Batch]:
    """The first `count` training examples of a task in `--data`, in batches of 8; with --quick random ones."""
    if bench.options.quick:
        return [bench.prompts(bench.options.prompt, [1] * count, seed=ord(task[-1]))]
    rows, tokenizer = read_task(bench.options.data / task, train_limit=count).train, bench.tokenizer
    examples = list(AnswerDataset(rows, tokenizer, seq2seq=False))  # type: ignore[call-overload]
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = [collate(examples[start : start + 8]) for start in range(0, len(examples), 8)]
    return [{name: value.to(bench.model.device) for name, value in batch.items()} for batch in batches]


def vectors_of(model: Any, task: str, batches: list[Batch], rule: str, steps: int = 20) -> AttributionVector:
    """Eq. 11 of one task's model on all examples."""
    found = [compute_attribution(model, batch, adapter=task, steps=steps, quadrature=rule) for batch in batches]
    return AttributionVector.cat(found)


def quadrature(bench: Bench) -> list[Record]:
    """How many nodes of adaptive quadrature have the error of 20 Riemann steps; and its error in bfloat16.

    Errors are those of the vectors (relative, L2) and of w between the models of the last two tasks.
    """
    (model, names), rows = demo_chain(bench), list[dict[str, Any]]()
    batches = [batch for name in names for batch in prompts_of(bench, name, 1)]
    exact = [vectors_of(model, name, batches, "riemann", bench.options.reference_steps).values for name in names[-2:]]
    rules = [(rule, m) for rule in ("riemann", "gauss_legendre", "adaptive") for m in getattr(bench.options, rule)]
    for rule, steps in [*rules, ("adaptive in bfloat16", 20)]:
        if rule.endswith("bfloat16"):
            model.to(torch.bfloat16)
        found = [vectors_of(model, name, batches, rule.split()[0], steps) for name in names[-2:]]
        pairs = list(zip(found, exact, strict=True))
        error = torch.cat([(a.values - b).norm(dim=-1) / b.norm(dim=-1) for a, b in pairs])
        w = (similarity(found[0].values, found[1].values) - similarity(*exact)).abs()
        nodes = statistics.mean(each.nodes for each in found)
        errors = {"error": error.median().item(), "worst": error.max().item(), "of w": w.median().item()}
        rows.append({"rule": rule, "m": steps, "nodes": nodes, **errors, "worst of w": w.max().item()})
    limit = next(row["error"] for row in rows if (row["rule"], row["m"]) == ("riemann", 20))
    enough = [row["nodes"] for row in rows if row["rule"] == "adaptive" and row["error"] <= limit]
    more: Any = {"bound": "at least", "target": 4, "unit": "nodes", "notes": {"errors": rows}}
    return [bench.record("quadrature", "adaptive, same error", "20 Riemann steps", enough[:1], [20.0], **more)]


def quadrature_time(bench: Bench) -> list[Record]:
    """What fewer nodes save in time: those that are added run in smaller batches."""
    model, names = demo_chain(bench)
    batches = [prompts_of(bench, name, bench.options.examples)[0] for name in names[:2]]
    sides = (partial(vectors_of, model, names[-1], batches, rule) for rule in ("adaptive", "riemann"))
    times, what = in_turn(*sides, repeats=bench.options.repeats), "attribution of 16 real prompts, adaptive, m = 20"
    return [bench.record("quadrature.time", what, "20 Riemann steps", *times, bound="at least")]


def probe(bench: Bench) -> list[Record]:
    """The standard error of w with a probe of 16 for each pair of tasks: the deviation over 64 examples / 4."""
    (model, names), errors = demo_chain(bench), dict[str, float]()
    for index, task in enumerate(names[1:], start=1):
        data = prompts_of(bench, task, bench.options.probe_examples)
        new = vectors_of(model, task, data, "adaptive").values
        for old in names[:index]:
            w = similarity(vectors_of(model, old, data, "adaptive").values, new)
            errors[f"{old}, {task}"] = w.std().item() / 16**0.5
    return [bench.record("probe", "standard error of w, 16 examples", "", errors.values(), unit="", notes=errors)]
