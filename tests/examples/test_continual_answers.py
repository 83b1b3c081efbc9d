"""Which questions count as answered right in the continual benchmark, against one prompt and option after another."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.tiny_tasks import WORDS, settings_of

SENTENCES = ["yes", "no good", "what is the sky"]


def random_task(data: Path) -> Any:
    """Prompts of 1 to 9 words, with options of different lengths."""
    draw = random.Random(0)
    task = sys.modules["tasks"].read_task(data / "signs")
    task.options = SENTENCES
    task.train = [("", draw.choice(SENTENCES)) for _ in range(10)]
    task.test = [(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))), draw.choice(SENTENCES)) for _ in range(40)]
    return task


def bits(right: list[bool]) -> str:
    return "".join("1" if each else "0" for each in right)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_options_are_scored_as_one_after_another(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str
) -> None:
    evaluation, task = benchmark("evaluation"), random_task(data)
    model, tokenizer = sys.modules["tasks"].load_model(str(saved[name]))
    scores = []
    for prompt, _ in task.test:
        sums = []
        for option in task.options:
            answer = torch.tensor([tokenizer(option, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]])
            ids = torch.tensor([tokenizer(prompt).input_ids])
            with torch.no_grad():
                if name == "t5":
                    logits = model.eval()(input_ids=ids, labels=answer).logits
                else:
                    logits = model.eval()(input_ids=torch.cat([ids, answer], 1)).logits[:, ids.shape[1] - 1 : -1]
            sums.append(float(torch.log_softmax(logits, -1).gather(-1, answer[..., None]).sum()))
        scores.append(sums)
    model.train()
    torch.testing.assert_close(
        evaluation.option_scores(model, tokenizer, task), torch.tensor(scores), atol=1e-4, rtol=1e-4
    )
    assert model.training, "as it was before"
    found = evaluation.answered_right(model, tokenizer, task, "both")
    answers = [answer for _, answer in task.test]
    likeliest = [task.options[each.index(max(each))] for each in scores]
    assert found["options"] == bits([a == b for a, b in zip(likeliest, answers, strict=True)])
    shares = [(1 + sum(row[1] == option for row in task.train)) / 13 for option in task.options]
    chances = torch.softmax(torch.tensor(scores, dtype=torch.float64), 1)  # by hand: over its mean, times the share
    best = (chances / chances.mean(0) * torch.tensor(shares)).argmax(1).tolist()
    assert found["calibrated"] == bits([task.options[b] == a for b, a in zip(best, answers, strict=True)])
    assert set(evaluation.answered_right(model, tokenizer, task, "options")) == {"options", "calibrated"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_generated_is_what_generate_gives_for_each_prompt(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Greedily, whatever the model's own settings for generation are."""
    settings, folder = settings_of(benchmark, data, saved[name], tmp_path), tmp_path / "own settings"
    model, tokenizer = sys.modules["tasks"].load_model(str(saved[name]))
    head = model.get_output_embeddings()  # otherwise a random model answers the same to everything
    known = torch.arange(len(head.weight))[:, None] < len(tokenizer)
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape) * 10 * known)
    model.config.tie_word_embeddings = False
    model.generation_config.update(repetition_penalty=9.0, num_beams=2)
    for each in (model, tokenizer):
        each.save_pretrained(folder)
    task = random_task(data)
    method = benchmark("chain").start_method(
        benchmark("methods").METHODS["seq_ft"], task, settings_of(benchmark, data, folder, tmp_path)
    )
    given = []
    for prompt, _ in task.test:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        new = method.model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, num_beams=1,
            repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        given.append(tokenizer.decode(new[0] if name == "t5" else new[0, ids.shape[1] :], skip_special_tokens=True))
    task.test = [(row[0], f" {text} " if place % 2 else "?") for place, (row, text) in enumerate(
        zip(task.test, given, strict=True))]  # fmt: skip
    found = benchmark("evaluation").answered_right(method.model, tokenizer, task, "generate", settings.max_tokens)
    assert found == {"generate": bits([place % 2 == 1 for place in range(40)])}


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
def test_calibration_takes_a_preference_out(benchmark: Any, shares: list[float], fresh_seed: int) -> None:
    calibrated = benchmark("evaluation").calibrated
    scores = torch.randn(50, 4, dtype=torch.float64) * 2
    chances = torch.softmax(scores, 1)
    torch.testing.assert_close(calibrated(scores, shares).exp(), chances / chances.mean(0) * torch.tensor(shares))
    right = torch.arange(400) % 4
    biased = 6 * torch.nn.functional.one_hot(right, 4) + 0.1 * torch.randn(400, 4) + torch.tensor([9.0, 0, 0, 0])
    assert (biased.argmax(1) == 0).all() and (calibrated(biased, [0.25] * 4).argmax(1) == right).all()
