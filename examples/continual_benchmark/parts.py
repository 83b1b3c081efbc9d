"""A training batch in parts of like length, with logits only where an answer stands: the same loss for less work.

Prompts of a random batch differ in length, so that half of what a model is given is padding; a vocabulary is large, so
that a fifth of the work is logits of prompts, which nobody asks for; and all prompts of a task begin alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from peft_aso.attribution import unwrap

from .beginning import cache_of, common, rows_of

Inputs = dict[str, Any]
# examples that go through the model at once; a GPU would wait for work
ON_CPU = 4


class Part(NamedTuple):
    """What the model was given, what it said, and which token it should have said at each place (-100: any)."""

    inputs: Inputs
    outputs: Any
    targets: torch.Tensor

    def answers(self, logits: torch.Tensor) -> torch.Tensor:
        """The rows `(tokens, vocabulary)` of `logits` that predict a token of an answer."""
        return logits[self.targets != -100]


class InPartsMixin:
    """Before a `Trainer` in the bases: takes the loss of a batch in parts."""

    part_size: int | None = None

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; as outputs, a list of `Part`."""
        in_parts = model.training and num_items_in_batch is not None
        losses, found = [], []
        for part in parts_of(model, inputs, self.part_size) if in_parts else [inputs]:
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, part, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            losses.append(loss)
            found.append(Part(part, outputs, _targets(model, part)))
        total = torch.stack(losses).sum()
        return (total, found) if return_outputs else total


def takes_parts(model: Any) -> bool:
    """Whether the model is a decoder that can leave out logits, and whose loss is a sum over a count it is given."""
    bare = unwrap(model)
    taken = inspect.signature(bare.forward).parameters
    kept = "logits_to_keep" in taken and any(each.kind is each.VAR_KEYWORD for each in taken.values())
    return kept and not bare.config.is_encoder_decoder and bare.loss_type == "ForCausalLM"


def parts_of(model: Any, inputs: Inputs, size: int | None = None) -> Iterator[Inputs]:
    """`inputs`, padded on the right, by length: parts of `size` examples, each as long as its longest.

    A part asks for logits at the places where one of its examples has an answer, `logits_to_keep`, and has the tokens
    that stand one further there, `shift_labels`. What all examples begin with is run once, before the first part, and
    comes to each as `past_key_values`; dropout draws one mask for it. A model that cannot do that gets all at once.
    """
    if not takes_parts(model):
        yield inputs
        return
    shared, beginning = _beginning(model, inputs)
    lengths = inputs["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    for rows in order.split(size or (ON_CPU if lengths.device.type == "cpu" else len(lengths))):
        part = {name: value[rows, : int(lengths[rows].max())] for name, value in inputs.items()}
        part.update({name: part[name][:, shared:] for name in ("input_ids", "labels")})
        ahead = _ahead(part["labels"])
        places = (ahead != -100).any(0).nonzero()[:, 0]
        part.update(logits_to_keep=places, shift_labels=ahead[:, places])
        if beginning is not None:
            part["past_key_values"] = rows_of(beginning, torch.zeros_like(rows))
        yield part


def _beginning(model: Any, inputs: Inputs) -> tuple[int, DynamicCache | None]:
    """How many tokens all examples begin with, before the last one of the shortest prompt, and their cache."""
    prompts = (inputs["labels"] != -100).int().argmax(1)  # its length: where the answer begins
    ids = inputs["input_ids"].tolist()
    shared = common(ids, int(prompts.min()) - 1)
    cache = cache_of(model, ids[0][:shared]) if shared else None
    return (0, None) if cache is None else (shared, cache)


def _ahead(labels: torch.Tensor) -> torch.Tensor:
    """The token one place further, as a decoder should say it."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def _targets(model: Any, inputs: Inputs) -> torch.Tensor:
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return inputs["labels"] if unwrap(model).config.is_encoder_decoder else _ahead(inputs["labels"])
