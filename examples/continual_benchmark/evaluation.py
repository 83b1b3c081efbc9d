"""What a model answers: generated and compared, or the likeliest of the options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import Task, shorten
from tqdm.auto import tqdm

from .beginning import cache_of, common, rows_of
from .options import calibrated, log_probabilities

BATCH = 20


@dataclass
class Answers:
    """What a model says to the test prompts of a task.

    Attributes:
        generated: greedily, as long as the longest option at most; empty if not asked for.
        scores: `(prompts, options)`, their tokens' log-probabilities summed; None if not asked for.
        outputs: `(vocabulary,)`, the mean distribution over the first token.
    """

    generated: list[str]
    scores: torch.Tensor | None = field(repr=False)
    outputs: torch.Tensor = field(repr=False)

    def correct(self, task: Task) -> dict[str, list[bool]]:
        """For each way of scoring, whether each example is answered right.

        `generate`: what is generated, stripped. `options`: the likeliest option. `calibrated`: that after options are
        made as likely, over all these prompts, as they are right answers in the task's training data.
        """
        found = {}
        if self.generated:
            found["generate"] = [
                given.strip() == row[1].strip() for given, row in zip(self.generated, task.test, strict=True)
            ]
        if self.scores is not None:
            right = [task.options.index(answer) for _, answer in task.test]
            ways = {"options": self.scores, "calibrated": calibrated(self.scores, _shares(task))}
            for way, scores in ways.items():
                found[way] = [a == b for a, b in zip(scores.argmax(1).tolist(), right, strict=True)]
        return found

    def likeliest(self, task: Task) -> list[str]:
        """The likeliest option of each prompt; empty if not asked for."""
        return [] if self.scores is None else [task.options[best] for best in self.scores.argmax(1).tolist()]

    def said(self, task: Task) -> dict[str, dict[str, int]]:
        """For each right answer what was said, stripped, and how often; generated if that was asked for."""
        found: dict[str, dict[str, int]] = {option.strip(): {} for option in task.options}
        for given, row in zip(self.generated or self.likeliest(task), task.test, strict=True):
            counts, text = found[row[1].strip()], given.strip()
            counts[text] = counts.get(text, 0) + 1
        return found


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, task: Task, score: str = "both", max_tokens: int = 512, bf16: bool = False
) -> Answers:
    """Have `model` answer the test prompts of `task`.

    Args:
        score: "generate", "options" or "both": which answers are wanted.
        bf16: products in bfloat16.
    """
    training = model.training
    model.eval()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        found = _answer(model, tokenizer, task, score, max_tokens)
    model.train(training)
    return found


def output_similarity(outputs: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """How alike the answers to different tasks are: the cosine of the mean distributions over their first token.

    Figure 5 of the paper, which does not say how it measures "similarity of final output distributions".
    """
    return {a: {b: float(torch.cosine_similarity(outputs[a], outputs[b], dim=0)) for b in outputs} for a in outputs}


def _answer(model: Any, tokenizer: Any, task: Task, score: str, max_tokens: int) -> Answers:
    seq2seq, padding = model.config.is_encoder_decoder, tokenizer.pad_token_id
    options = [
        tokenizer(option if seq2seq else f" {option}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        for option in task.options
    ]
    longest = max(map(len, options))
    prompts = [shorten(tokenizer(prompt).input_ids, max_tokens - longest) for prompt, _ in task.test]
    shared = 0 if seq2seq else common(prompts, min(map(len, prompts)) - 1)
    beginning = cache_of(model, prompts[0][:shared]) if shared else None
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    generated, scores, total = [""] * len(prompts), torch.zeros(len(prompts), len(options)), torch.zeros(())
    for start in tqdm(range(0, len(order), BATCH), desc=task.name, unit="batch", leave=False):
        chosen = order[start : start + BATCH]
        batch = _padded_left([prompts[index] for index in chosen], shared, padding, model.device)
        tokens = 1 if score == "options" else longest
        said = _said(model, batch, beginning, tokens, padding, tokenizer.eos_token_id)
        first = said.logits[0].float()
        total = total + torch.softmax(first, -1).sum(0).cpu()
        new = said.sequences if seq2seq else said.sequences[:, batch["input_ids"].shape[1] :]
        for index, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            generated[index] = text
        if score != "generate":
            found = log_probabilities(model, batch, first, said.past_key_values, options, padding)
            scores[chosen] = found.float().cpu()
    return Answers(
        generated if score != "options" else [], scores if score != "generate" else None, total / len(prompts)
    )


def _shares(task: Task) -> list[float]:
    """Of each option among the training examples; one example more of each, so that none has no share."""
    answers = [answer for _, answer in task.train]
    counts = [1 + answers.count(option) for option in task.options]
    return [count / sum(counts) for count in counts]


def _said(model: Any, batch: dict[str, torch.Tensor], beginning: Any, tokens: int, padding: int, end: int) -> Any:
    """What `generate` says, with logits and cache: the likeliest tokens, whatever the model's own settings."""
    rows = torch.zeros(len(batch["input_ids"]), dtype=torch.long, device=model.device)
    given = {} if beginning is None else {"past_key_values": rows_of(beginning, rows)}
    return model.generate(
        **batch, **given, max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
        no_repeat_ngram_size=0, min_length=0, pad_token_id=padding, eos_token_id=end, use_cache=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def _padded_left(prompts: list[list[int]], shared: int, padding: int, device: Any) -> dict[str, torch.Tensor]:
    """One length for all, the padding between what they share and what is their own."""
    length = max(map(len, prompts))
    ids = [prompt[:shared] + [padding] * (length - len(prompt)) + prompt[shared:] for prompt in prompts]
    real = [[1] * shared + [0] * (length - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(real, device=device)}
