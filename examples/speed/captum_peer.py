"""The same attribution by Captum's `IntegratedGradients`: a layer at a time, through a patched forward."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.attr import IntegratedGradients

from peft_aso.attribution import NeuronLayer, find_neurons

from .batches import Batch
from .timing import wait


@dataclass
class Question:
    """A batch as Captum's forward function needs it.

    Attributes:
        inputs: the model's inputs, without labels.
        targets: the id to predict at each position of the logits, `(B, L)`, or -100; `(B,)` classes.
        scaled: bool `(B, L of the stack)`: the positions whose neurons are scaled together.
        columns: the positions of the logits at which any row has an answer.
    """

    inputs: Batch
    targets: torch.Tensor
    scaled: torch.Tensor
    columns: torch.Tensor | None = field(default=None)


def question(model: Any, batch: Batch, stack: str) -> Question:
    """What is asked of Captum: see the table in `peft_aso/attribution/answer.py`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if labels.ndim == 1:
        return Question(inputs, labels, inputs["attention_mask"].bool())
    inputs["use_cache"] = False  # type: ignore[assignment]
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        scaled = labels != -100 if stack == "decoder" else inputs["attention_mask"].bool()
        return Question(inputs, labels, scaled)
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    return Question(inputs, targets, targets != -100, (targets != -100).any(0).nonzero()[:, 0])


def answer_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 9, `(R,)`: the product of the answer tokens' probabilities."""
    if targets.ndim == 1:
        return logits.float().softmax(-1).gather(1, targets[:, None])[:, 0]
    rows, places = (targets != -100).nonzero(as_tuple=True)
    logs = logits[rows, places].float().log_softmax(-1).gather(1, targets[rows, places][:, None])[:, 0]
    return torch.zeros(len(logits), dtype=logs.dtype, device=logs.device).index_add(0, rows, logs).exp()


def captum_layer(
    model: Any, asked: Question, layer: NeuronLayer, steps: int, rows: int | None, needed_only: bool = False
) -> torch.Tensor:
    """Eq. 11 for the neurons of one layer, `(B, size)`.

    Args:
        rows: how many rows (examples x steps) go through the model at once; None: all.
        needed_only: have the model compute logits at the positions of answers only (`logits_to_keep`).
    """
    values: list[torch.Tensor] = []
    hook = layer.module.register_forward_pre_hook(lambda _, args: values.append(args[0].detach()))
    keep = {"logits_to_keep": asked.columns} if needed_only else {}
    try:
        with torch.no_grad():
            model(**asked.inputs, **keep)
    finally:
        hook.remove()
    targets = asked.targets[:, asked.columns] if needed_only else asked.targets

    def probability(neurons: torch.Tensor) -> torch.Tensor:
        copies = len(neurons) // len(asked.scaled)
        scaled = asked.scaled.repeat(copies, 1)[:, :, None]

        def put(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (torch.where(scaled, neurons, args[0]),)

        handle = layer.module.register_forward_pre_hook(put)
        try:
            logits = model(**_repeated(asked.inputs, copies), **keep).logits
        finally:
            handle.remove()
        return answer_probability(logits, targets.repeat(copies, *[1] * (targets.ndim - 1)))

    found = IntegratedGradients(probability).attribute(
        values[0], n_steps=steps, method="riemann_right", internal_batch_size=rows
    )
    return torch.where(asked.scaled[:, :, None], found, torch.zeros_like(found)).sum(1).detach()


def _repeated(inputs: Batch, copies: int) -> dict[str, Any]:
    return {
        name: value.repeat(copies, 1) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def stack_layers(model: Any, stack: str) -> list[NeuronLayer]:
    """The layers of one stack, lowest first."""
    return [layer for layer in find_neurons(model) if layer.stack == stack]


def spread_layers(layers: Sequence[NeuronLayer], count: int | None) -> list[NeuronLayer]:
    """`count` of the layers, evenly spread from the lowest to the highest; None: all."""
    if count is None or count >= len(layers):
        return list(layers)
    if count == 1:
        return [layers[len(layers) // 2]]
    return [layers[round(index * (len(layers) - 1) / (count - 1))] for index in range(count)]


def affordable_rows(model: Any, asked: Question, steps: int) -> int | None:
    """Rows that Captum may run at once in a quarter of the free memory; None where all fit.

    A row keeps its whole graph: the logits about three times, and a dozen hidden states and five FFN states a layer.
    """
    examples, positions = asked.inputs["input_ids"].shape
    config = model.config
    hidden = getattr(config, "hidden_size", None) or config.d_model
    ffn = getattr(config, "intermediate_size", None) or config.d_ff
    blocks = config.num_hidden_layers + (getattr(config, "num_decoder_layers", None) or 0)
    width = blocks * (12 * hidden + 5 * ffn) + (3 * config.vocab_size if asked.columns is not None else 0)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = max(1, free // 4 // (positions * width * 4) // examples) * examples
    return None if rows >= examples * steps else int(rows)


def release(model: Any) -> None:
    """Hand memory back to the device between the sides."""
    wait()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
