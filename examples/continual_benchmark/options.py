"""How likely each option is as the answer: it is run on the cache of its prompt."""

from __future__ import annotations

import math
from typing import Any

import torch

from .beginning import is_plain, rows_of

# prompts times options that are scored at once
SCORED = 80


def log_probabilities(
    model: Any, batch: dict[str, torch.Tensor], first: torch.Tensor, cache: Any, options: list[list[int]], padding: int
) -> torch.Tensor:
    """`(prompts, options)`: the log-probability of each option as the answer, its tokens' summed.

    Args:
        batch: the prompts.
        first: `(prompts, vocabulary)`, logits of the first token of an answer.
        cache: what the model kept of the prompts, and perhaps of tokens after them; without it, as for an
            encoder-decoder, prompts are run again.
        options: tokens of each.
    """
    count, size = len(options), max(1, SCORED // len(options))
    ids, real = _padded(options, padding, first.device)
    found = []
    for start in range(0, len(first), size):
        rows = torch.arange(start, min(start + size, len(first)), device=first.device)
        each = rows.repeat_interleave(count)
        answers, there = ids.repeat(len(rows), 1), real.repeat(len(rows), 1)
        if model.config.is_encoder_decoder:
            logits = _logits_encoder_decoder(model, batch, rows, count, answers.masked_fill(~there, -100))
        elif is_plain(cache):
            logits = _logits_causal(model, batch, first, cache, each, answers, there)
        else:
            logits = _logits_anew(model, batch, each, answers, there)
        logs = torch.log_softmax(logits.float(), -1).gather(-1, answers[..., None])[..., 0]
        found.append((logs * there).sum(1).view(len(rows), count))
    return torch.cat(found)


def calibrated(scores: torch.Tensor, shares: list[float]) -> torch.Tensor:
    """`(prompts, options)`: log-probabilities without what a model prefers over all these prompts together.

    Each option's probability is divided by its mean over the prompts (after Batch Calibration, Zhou et al. 2024) and
    multiplied by its share. No right answer is looked at. If a model only came to prefer some of the options, this
    brings the answers back; if it no longer tells prompts apart, it cannot.

    Args:
        scores: `(prompts, options)`, log-probabilities.
        shares: of each option among right answers, above 0.
    """
    logs = torch.log_softmax(scores.double(), 1)
    mean = torch.logsumexp(logs, 0) - math.log(len(logs))
    return logs - mean + torch.tensor(shares, dtype=logs.dtype).log()


def _logits_causal(
    model: Any, batch: dict[str, torch.Tensor], first: torch.Tensor, cache: Any, each: torch.Tensor,
    answers: torch.Tensor, there: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Logits of the options' tokens, each option run on the cache of its prompt."""
    before = first[each][:, None]
    if answers.shape[1] == 1:
        return before
    length = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"][each], there[:, :-1].long()], 1)
    prompts = rows_of(cache, each)
    prompts.crop(length - prompts.get_seq_length())
    more = model(
        input_ids=answers[:, :-1],
        attention_mask=mask,
        position_ids=_places(mask)[:, length:],
        past_key_values=prompts,
    ).logits
    return torch.cat([before, more.float()], 1)


def _logits_anew(
    model: Any, batch: dict[str, torch.Tensor], each: torch.Tensor, answers: torch.Tensor, there: torch.Tensor
) -> torch.Tensor:
    """The same for a model whose cache cannot be cut and shared."""
    mask = torch.cat([batch["attention_mask"][each], there.long()], 1)
    ids = torch.cat([batch["input_ids"][each], answers], 1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=_places(mask)).logits
    return logits[:, -answers.shape[1] - 1 : -1]


def _logits_encoder_decoder(
    model: Any, batch: dict[str, torch.Tensor], rows: torch.Tensor, count: int, labels: torch.Tensor
) -> torch.Tensor:
    """The same with the encoder run once a prompt."""
    mask = batch["attention_mask"][rows]
    states = model.get_encoder()(input_ids=batch["input_ids"][rows], attention_mask=mask)
    states.last_hidden_state = states.last_hidden_state.repeat_interleave(count, 0)
    return model(encoder_outputs=states, attention_mask=mask.repeat_interleave(count, 0), labels=labels).logits


def _places(mask: torch.Tensor) -> torch.Tensor:
    """As in `generate`, tokens are numbered without the padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _padded(options: list[list[int]], padding: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(option) for option in options)
    ids = torch.tensor([option + [padding] * (length - len(option)) for option in options], device=device)
    places = torch.arange(length, device=device)
    return ids, places < torch.tensor([len(option) for option in options], device=device)[:, None]
