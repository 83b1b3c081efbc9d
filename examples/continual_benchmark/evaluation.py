"""Which test questions a model answers right: generated and compared, or the likeliest of the options."""

from __future__ import annotations

import math
from typing import Any

import torch
from tasks import Task, generated_answers, shorten
from tqdm.auto import tqdm

ROWS = 80  # prompts times options that are scored at once


@torch.no_grad()
def answered_right(
    model: Any, tokenizer: Any, task: Task, score: str = "both", max_tokens: int = 512, bf16: bool = False
) -> dict[str, str]:
    """By way of scoring, one character a test question: 1 where it is answered right, else 0.

    `generate`: what is generated greedily, stripped, is the answer. `options`: the likeliest option is. `calibrated`:
    the likeliest option is, after options are made as likely, over all these prompts, as they are right answers in the
    task's training data.

    Args:
        score: "generate", "options" (and calibrated), or "both".
        bf16: products in bfloat16.
    """
    found = {}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        if score != "options":
            given = generated_answers(model, tokenizer, task, max_tokens=max_tokens)
            right = [text.strip() == answer.strip() for text, (_, answer) in zip(given, task.test, strict=True)]
            found["generate"] = "".join("01"[each] for each in right)
        if score != "generate":
            scores = option_scores(model, tokenizer, task, max_tokens)
            answers = torch.tensor([task.options.index(answer) for _, answer in task.test])
            trained = [answer for _, answer in task.train]  # one more of each, so that none has no share
            shares = [(1 + trained.count(option)) / (len(trained) + len(task.options)) for option in task.options]
            for way, values in (("options", scores), ("calibrated", calibrated(scores, shares))):
                found[way] = "".join("01"[each] for each in (values.argmax(1) == answers).tolist())
    return found


@torch.no_grad()
def option_scores(model: Any, tokenizer: Any, task: Task, max_tokens: int = 512) -> torch.Tensor:
    """`(prompts, options)`: the log-probability of each option as the answer, its tokens' summed.

    Options are run on the cache of their prompt (an encoder's states), which is run once.
    """
    training, device, seq2seq = model.training, model.device, model.config.is_encoder_decoder
    model.eval()
    options = [
        tokenizer(option if seq2seq else f" {option}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        for option in task.options
    ]
    count, longest = len(options), max(map(len, options))
    prompts = [shorten(tokenizer(prompt).input_ids, max_tokens - longest) for prompt, _ in task.test]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    padded = tokenizer.pad({"input_ids": options}, padding_side="right", return_tensors="pt").to(device)
    scores = torch.zeros(len(prompts), count)
    size = max(1, ROWS // count)
    for start in tqdm(range(0, len(order), size), desc=f"{task.name}, options", leave=False, unit="batch"):
        chosen = order[start : start + size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        batch = batch.to(device)
        answers, there = (padded[key].repeat(len(chosen), 1) for key in ("input_ids", "attention_mask"))
        mask = batch["attention_mask"].repeat_interleave(count, 0)
        if seq2seq:
            states = model.get_encoder()(**batch)
            states.last_hidden_state = states.last_hidden_state.repeat_interleave(count, 0)
            labels = answers.masked_fill(there == 0, -100)
            logits = model(encoder_outputs=states, attention_mask=mask, labels=labels).logits
        else:
            length = mask.shape[1]
            mask = torch.cat([mask, there[:, :-1]], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # tokens are numbered without the padding
            said = model(**batch, position_ids=positions[::count, :length], use_cache=True)
            logits = said.logits[:, -1:].repeat_interleave(count, 0)
            said.past_key_values.batch_repeat_interleave(count)
            if longest > 1:
                more = model(
                    input_ids=answers[:, :-1], attention_mask=mask, position_ids=positions[:, length:],
                    past_key_values=said.past_key_values,
                )  # fmt: skip
                logits = torch.cat([logits, more.logits], 1)
        logs = torch.log_softmax(logits.float(), -1).gather(-1, answers[..., None])[..., 0]
        scores[chosen] = (logs * there).sum(1).view(len(chosen), count).float().cpu()
    model.train(training)
    return scores


def calibrated(scores: torch.Tensor, shares: list[float]) -> torch.Tensor:
    """`(prompts, options)`: log-probabilities without what a model prefers over all these prompts together.

    Each option's probability is divided by its mean over the prompts (after Batch Calibration, Zhou et al. 2024) and
    multiplied by its share. No right answer is read. If a model only came to prefer some of the options, this brings
    the answers back; if it no longer tells prompts apart, it cannot.

    Args:
        scores: `(prompts, options)`, log-probabilities.
        shares: of each option among right answers, above 0.
    """
    logs = torch.log_softmax(scores.double(), 1)
    mean = torch.logsumexp(logs, 0) - math.log(len(logs))
    return logs - mean + torch.tensor(shares, dtype=logs.dtype).log()
