"""Attribution of all layers against Captum, a layer at a time; and how ours grows with tokens and layers."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from peft_aso import AttributionVector, compute_attribution

from .batches import Batch, answered
from .bench import Bench
from .captum_peer import affordable_rows, captum_layer, question, release, spread_layers, stack_layers
from .operations import captum_operations, machine_peak, our_operations
from .records import Record, Sameness
from .timing import relative, repeated, seconds


def decoder_stack(bench: Bench) -> str:
    """What the decoder layers are called: those of a causal model stand in the only stack."""
    return "decoder" if bench.subject.kind == "seq2seq" else "single"


def decoder_batch(bench: Bench, answers: list[int]) -> Batch:
    """128-token prompts for a causal model, encoder inputs of 64 tokens for T5."""
    sizes = bench.sizes
    return answered(bench.subject, sizes.prompt if bench.subject.kind == "causal" else sizes.encoder_tokens, answers)


def ours_of(bench: Bench, batch: Batch, stack: str) -> AttributionVector:
    """All layers of one stack, m = 20, right Riemann sum."""
    chosen = "all" if stack == "single" else stack
    return compute_attribution(bench.subject.model, batch, steps=bench.sizes.steps, stacks=chosen)


def mixed_answers(bench: Bench) -> list[int]:
    """Lengths of answers from 1 to 4 tokens, two of each in turn."""
    return [1 + (index // 2) % 4 for index in range(bench.sizes.examples)]


def one_token(bench: Bench) -> list[Record]:
    """All decoder layers, answers of one token."""
    batch = decoder_batch(bench, [1] * bench.sizes.examples)
    return [_line(bench, "attribution.one", "answers of one token", batch, decoder_stack(bench), 60)]


def packed(bench: Bench) -> list[Record]:
    """The same with answers of 1 to 4 tokens in one batch."""
    answers = mixed_answers(bench)
    batch = decoder_batch(bench, answers)
    return [_line(bench, "attribution.packed", f"answers of {answers} tokens", batch, decoder_stack(bench), 25)]


def encoder(bench: Bench) -> list[Record]:
    """Encoder neurons: of T5, or of BERT."""
    batch = answered(bench.subject, bench.sizes.encoder_tokens, [1] * bench.sizes.examples)
    stack = "encoder" if bench.subject.kind == "seq2seq" else "single"
    return [_line(bench, "attribution.encoder", "encoder neurons", batch, stack, 2)]


def _line(bench: Bench, line: str, what: str, batch: Batch, stack: str, target: float) -> Record:
    sizes, model = bench.sizes, bench.subject.model
    layers = stack_layers(model, stack)
    chosen = spread_layers(layers, sizes.captum_layers)
    bench.say(f"{line}: {what}; ours first")
    vector = ours_of(bench, batch, stack)  # the self-check runs here, once a model
    ours = repeated(lambda: ours_of(bench, batch, stack), sizes.repeats, warm_up=0)
    asked = question(model, batch, stack)
    rows = affordable_rows(model, asked, sizes.steps)
    scores, times = _captum(bench, line, asked, chosen, rows)
    ours += repeated(lambda: ours_of(bench, batch, stack), sizes.repeats, warm_up=0)
    whole = sum(times) * len(layers) / len(chosen)
    notes = _captum_notes(chosen, layers, times, rows)
    if asked.columns is not None:
        notes.update(_stronger(bench, line, asked, chosen, rows, statistics.median(ours), len(layers)))
    length = sizes.prompt if bench.subject.kind == "causal" else sizes.encoder_tokens
    return Record(
        line,
        bench.subject.label,
        f"attribution, all {len(layers)} layers, m = {sizes.steps}, {sizes.examples} x {length} tokens, {what}",
        "Captum's IntegratedGradients, layer by layer",
        ours,
        [whole],
        bound="at least",
        target=target,
        sameness=_sameness(bench, vector, scores),
        notes=notes,
    )


def _captum(
    bench: Bench, line: str, asked: Any, chosen: list[Any], rows: int | None, needed_only: bool = False
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Scores and seconds of each of the chosen layers."""
    scores: dict[str, torch.Tensor] = {}
    times = []

    def run(layer: Any) -> None:
        scores[layer.name] = captum_layer(bench.subject.model, asked, layer, bench.sizes.steps, rows, needed_only)

    for layer in chosen:
        release(bench.subject.model)
        times.append(seconds(lambda layer=layer: run(layer)))  # type: ignore[misc]
        variant = ", logits where needed" if needed_only else ""
        bench.say(f"{line}: Captum{variant}, {layer.name}: {times[-1]:.1f} s")
    return scores, times


def _captum_notes(chosen: list[Any], layers: list[Any], times: list[float], rows: int | None) -> dict[str, Any]:
    timed = "all layers timed"
    if len(chosen) < len(layers):
        timed = (
            f"{len(chosen)} of {len(layers)} layers timed, evenly spread, times {len(layers)}/{len(chosen)}: a layer "
            "costs a whole forward pass and a backward pass down to it, which is linear in its depth"
        )
    return {
        "Captum": timed,
        "Captum, seconds by layer": {layer.name: value for layer, value in zip(chosen, times, strict=True)},
        "Captum, rows at once (internal_batch_size)": "all" if rows is None else rows,
    }


def _stronger(
    bench: Bench, line: str, asked: Any, chosen: list[Any], rows: int | None, ours: float, layers: int
) -> dict[str, Any]:
    """Captum again, with logits at the answers' positions only."""
    _, times = _captum(bench, line, asked, chosen, rows, needed_only=True)
    whole = sum(times) * layers / len(chosen)
    return {"Captum with logits_to_keep, seconds": whole, "Captum with logits_to_keep, ratio": whole / ours}


def _sameness(bench: Bench, vector: AttributionVector, scores: dict[str, torch.Tensor]) -> list[Sameness]:
    """The layers that Captum ran: against the largest score of the batch, and of each example."""
    columns = {name: slice(start, stop) for name, start, stop in vector.layout}
    mine = torch.cat([vector.scores[:, columns[name]] for name in scores], 1)
    theirs = torch.cat(list(scores.values()), 1).to(mine.device)
    rows = max(relative(a, b) for a, b in zip(mine, theirs, strict=True))
    # in half precision each side rounds the model's states in its own way: the check is for gross errors only
    limits = (1e-5, 1e-4) if bench.exact else (0.1, 0.3)
    return [
        Sameness("scores, against the largest of the batch", relative(mine, theirs), limits[0]),
        Sameness("scores, against the largest of the same example, worst example", rows, limits[1]),
    ]


def operations(bench: Bench) -> list[Record]:
    """Floating-point operations of both sides, and the share of the machine's peak that ours reaches."""
    sizes, model, stack = bench.sizes, bench.subject.model, decoder_stack(bench)
    records = []
    answers = {"one": [1] * sizes.examples, "packed": mixed_answers(bench)}
    for name, lengths in answers.items():
        bench.say(f"operations, {name}: counting")
        batch = decoder_batch(bench, lengths)
        ours_of(bench, batch, stack)
        ours = our_operations(lambda batch=batch: ours_of(bench, batch, stack))  # type: ignore[misc]
        layers = stack_layers(model, stack)
        chosen = spread_layers(layers, sizes.captum_layers)
        theirs = captum_operations(model, question(model, batch, stack), chosen, sizes.steps)
        taken = statistics.median(repeated(lambda batch=batch: ours_of(bench, batch, stack), sizes.repeats))  # type: ignore[misc]
        records.append(
            Record(
                f"attribution.operations.{name}",
                bench.subject.label,
                f"floating-point operations, all {len(layers)} layers, answers of {lengths} tokens",
                "Captum's, layer by layer",
                [float(ours)],
                [theirs * len(layers) / len(chosen)],
                bound="at least",
                unit="FLOP",
                notes=_share(bench, ours, taken),
            )
        )
    return records


def _share(bench: Bench, operations_: int, taken: float) -> dict[str, Any]:
    peak = machine_peak(bench.device, bench.subject.model.dtype, bench.sizes.peak)
    return {
        "seconds": taken,
        "reached, GFLOP/s": operations_ / taken / 1e9,
        f"the machine's peak (best of ten {bench.sizes.peak} x {bench.sizes.peak} products), GFLOP/s": peak / 1e9,
        "share of the peak": operations_ / taken / peak,
    }


def growth_in_tokens(bench: Bench) -> list[Record]:
    """Ours by length of the prompt, one-token answers; Captum by its count of operations."""
    return [
        _growth(bench, "growth.tokens", bench.subject.model, tokens, f"prompt of {tokens} tokens")
        for tokens in bench.sizes.growth_tokens
    ]


def growth_in_layers(bench: Bench) -> list[Record]:
    """Ours by number of layers: the lowest ones of the model."""
    records = []
    for count in bench.sizes.growth_layers:
        model = bench.subject.fresh()
        if count > len(model.model.layers):
            continue
        model.model.layers = model.model.layers[:count]
        model.config.num_hidden_layers = count
        records.append(_growth(bench, "growth.layers", model, bench.sizes.prompt, f"{count} layers"))
    return records


def _growth(bench: Bench, line: str, model: Any, tokens: int, what: str) -> Record:
    bench.say(f"{line}: {what}")
    sizes = bench.sizes
    batch = answered(bench.subject, tokens, [1] * sizes.examples)

    def run() -> AttributionVector:
        return compute_attribution(model, batch, steps=sizes.steps)

    ours = repeated(run, sizes.repeats)
    layers = stack_layers(model, "single")
    middle = spread_layers(layers, 1)
    theirs = captum_operations(model, question(model, batch, "single"), middle, sizes.steps) * len(layers)
    count = our_operations(run)
    notes = {"operations, ours": count, "operations, Captum (middle layer x layers)": theirs}
    against = "-"
    return Record(line, bench.subject.label, f"attribution, {what}, one-token answers", against, ours, [], notes=notes)
