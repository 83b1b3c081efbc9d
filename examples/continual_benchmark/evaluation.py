"""What a model answers: generated and compared, or the likeliest of the options."""

from __future__ import annotations

from typing import Any

import torch
from tasks import Task, generated_answers, shorten
from tqdm.auto import tqdm

BATCH = 20


def correct(model: Any, tokenizer: Any, task: Task, score: str, max_tokens: int, bf16: bool) -> dict[str, list[bool]]:
    """For each way of scoring that `score` names, whether each test example is answered right.

    "generate": greedy, stripped, equal to the answer. "options": of all options the answer is the likeliest, its
    tokens' log-probabilities summed.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = {}
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        if score in ("generate", "both"):
            answers = generated_answers(model, tokenizer, task, BATCH, task.name, max_tokens)
            found["generate"] = [
                given.strip() == row[1].strip() for given, row in zip(answers, task.test, strict=True)
            ]
        if score in ("options", "both"):
            chosen = likeliest(model, tokenizer, task, max_tokens)
            found["options"] = [option == row[1] for option, row in zip(chosen, task.test, strict=True)]
    model.train(training)
    return found


def likeliest(model: Any, tokenizer: Any, task: Task, max_tokens: int = 512) -> list[str]:
    """The likeliest option for each test prompt."""
    seq2seq = model.config.is_encoder_decoder
    options = [
        tokenizer(option if seq2seq else f" {option}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        for option in task.options
    ]
    longest = max(len(option) for option in options)
    prompts = [shorten(tokenizer(prompt).input_ids, max_tokens - longest) for prompt, _ in task.test]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    size = max(1, 4 * BATCH // len(options))
    for start in tqdm(range(0, len(order), size), desc=f"{task.name}, options", unit="batch", leave=False):
        chosen = order[start : start + size]
        score = _encoder_decoder if seq2seq else _causal
        sums = score(model, tokenizer, [prompts[index] for index in chosen], options)
        for index, best in zip(chosen, sums.argmax(1).tolist(), strict=True):
            found[index] = task.options[best]
    return found


def output_similarity(
    model: Any, tokenizer: Any, tasks: list[Task], max_tokens: int = 512
) -> dict[str, dict[str, float]]:
    """How alike the answers to different tasks are: the cosine of the mean distributions over their first token.

    Figure 5 of the paper, which does not say how it measures "similarity of final output distributions".
    """
    training = model.training
    model.eval()
    means = {task.name: _mean_distribution(model, tokenizer, task, max_tokens) for task in tasks}
    model.train(training)
    return {a: {b: float(torch.cosine_similarity(means[a], means[b], dim=0)) for b in means} for a in means}


@torch.no_grad()
def _mean_distribution(model: Any, tokenizer: Any, task: Task, max_tokens: int) -> torch.Tensor:
    prompts = sorted((shorten(tokenizer(prompt).input_ids, max_tokens) for prompt, _ in task.test), key=len)
    total = torch.zeros(())
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"{task.name}, outputs", unit="batch", leave=False):
        side = "right" if model.config.is_encoder_decoder else "left"
        some = tokenizer.pad({"input_ids": prompts[start : start + BATCH]}, padding_side=side, return_tensors="pt")
        some = some.to(model.device)
        if model.config.is_encoder_decoder:
            first = torch.full_like(some["input_ids"][:, :1], model.config.decoder_start_token_id)
            logits = model(**some, decoder_input_ids=first).logits
        else:
            logits = model(**some, logits_to_keep=1).logits
        total = total + torch.softmax(logits[:, -1].float(), -1).sum(0).cpu()
    return total / len(prompts)


def _causal(model: Any, tokenizer: Any, prompts: list[list[int]], options: list[list[int]]) -> torch.Tensor:
    """Summed log-probabilities `(prompts, options)`: each prompt is run once, and each option on its cache."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = model(**batch, use_cache=True, logits_to_keep=1)
    cache, count = output.past_key_values, len(options)
    cache.batch_repeat_interleave(count)
    ids, real = _padded(options, tokenizer.pad_token_id, model.device)
    ids, real = ids.repeat(len(prompts), 1), real.repeat(len(prompts), 1)
    mask = torch.cat([batch["attention_mask"].repeat_interleave(count, 0), real[:, :-1].long()], 1)
    logits = output.logits[:, -1:].repeat_interleave(count, 0)
    if ids.shape[1] > 1:
        # as in `generate`, tokens are numbered from the first that is not padding
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, batch["input_ids"].shape[1] :]
        more = model(input_ids=ids[:, :-1], attention_mask=mask, position_ids=places, past_key_values=cache).logits
        logits = torch.cat([logits, more], 1)
    return _summed(logits, ids, real).view(len(prompts), count)


def _encoder_decoder(model: Any, tokenizer: Any, prompts: list[list[int]], options: list[list[int]]) -> torch.Tensor:
    """The same with the encoder run once a prompt."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    states = model.get_encoder()(**batch)
    count = len(options)
    states.last_hidden_state = states.last_hidden_state.repeat_interleave(count, 0)
    ids, real = _padded(options, tokenizer.pad_token_id, model.device)
    ids, real = ids.repeat(len(prompts), 1), real.repeat(len(prompts), 1)
    mask = batch["attention_mask"].repeat_interleave(count, 0)
    logits = model(encoder_outputs=states, attention_mask=mask, labels=ids.masked_fill(~real, -100)).logits
    return _summed(logits, ids, real).view(len(prompts), count)


def _padded(options: list[list[int]], padding: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(option) for option in options)
    ids = torch.tensor([option + [padding] * (length - len(option)) for option in options], device=device)
    places = torch.arange(length, device=device)
    return ids, places < torch.tensor([len(option) for option in options], device=device)[:, None]


def _summed(logits: torch.Tensor, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    logs = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]
    return (logs * real).sum(1)
