"""Random inputs: prompts with answers, and batches to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .models import Subject

Batch = dict[str, torch.Tensor]
_FIRST_ID = 3  # ids below are padding, end and start in the random models


def tokens(subject: Subject, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random token ids on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_FIRST_ID, subject.model.config.vocab_size, shape, generator=generator)


def answered(subject: Subject, prompt: int, answers: Sequence[int], seed: int = 0) -> Batch:
    """Prompts of `prompt` tokens, one row for each number in `answers`: how many tokens its answer has.

    The answer is the model's own first choice, token by token, so that its probability is that of a real answer.
    Causal rows are padded on the right; a classifier is given classes instead.
    """
    ids = tokens(subject, (len(answers), prompt), seed).to(subject.model.device)
    mask = torch.ones_like(ids)
    if subject.kind == "encoder":
        with torch.no_grad():
            classes = subject.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        return {"input_ids": ids, "attention_mask": mask, "labels": classes}
    chosen = _greedy(subject, ids, max(answers))
    places = torch.arange(max(answers), device=ids.device)[None]
    absent = places >= torch.tensor(answers, device=ids.device)[:, None]
    labels = chosen.masked_fill(absent, -100)
    if subject.kind == "seq2seq":
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {
        "input_ids": torch.cat([ids, chosen.masked_fill(absent, 0)], 1),
        "attention_mask": torch.cat([mask, (~absent).long()], 1),
        "labels": torch.cat([torch.full_like(ids, -100), labels], 1),
    }


@torch.no_grad()
def _greedy(subject: Subject, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The model's first choices, `(B, count)`, without special tokens."""
    model = subject.model
    start = torch.full_like(ids[:, :1], getattr(model.config, "decoder_start_token_id", None) or 0)
    chosen = ids[:, :0]
    for _ in range(count):
        if subject.kind == "seq2seq":
            inputs: dict[str, Any] = {"input_ids": ids, "decoder_input_ids": torch.cat([start, chosen], 1)}
        else:
            inputs = {"input_ids": torch.cat([ids, chosen], 1)}
        best = model(**inputs).logits[:, -1, _FIRST_ID:].argmax(-1, keepdim=True) + _FIRST_ID
        chosen = torch.cat([chosen, best], 1)
    return chosen


def training(subject: Subject, batch: int, length: int, seed: int = 0) -> Batch:
    """A batch of `batch` x `length` random tokens with an answer of one token."""
    return answered(subject, length - (subject.kind == "causal"), [1] * batch, seed)
