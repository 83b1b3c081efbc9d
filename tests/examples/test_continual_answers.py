"""What a model answers in the continual benchmark, against one prompt and one option after another."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.tiny_tasks import WORDS

SENTENCES = ["yes", "no good", "what is the sky"]


def random_task(data: Path, shared: int) -> Any:
    """Prompts of 1 to 9 words after `shared` that all have."""
    draw = random.Random(0)
    beginning = draw.choices(WORDS, k=shared)
    task = sys.modules["tasks"].read_task(data / "signs")
    task.options = SENTENCES
    task.test = [(" ".join([*beginning, *draw.choices(WORDS, k=draw.randint(1, 9))]), "yes") for _ in range(25)]
    return task


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_options_are_scored_as_one_after_another(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str, shared: int
) -> None:
    evaluation, tasks = benchmark("evaluation"), sys.modules["tasks"]
    model, tokenizer = tasks.load_model(str(saved[name]))
    task = random_task(data, shared)
    found = evaluation.answer(model.eval(), tokenizer, task, "both")
    alone = evaluation.answer(model.eval(), tokenizer, task, "options")
    assert not alone.generated
    torch.testing.assert_close(alone.scores, found.scores, atol=1e-5, rtol=1e-4)
    firsts, scores = [], []
    for prompt, _ in task.test:
        sums = []
        for option in task.options:
            answer = torch.tensor([tokenizer(option, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]])
            ids = torch.tensor([tokenizer(prompt).input_ids])
            with torch.no_grad():
                if name == "t5":
                    logits = model(input_ids=ids, labels=answer).logits
                else:
                    logits = model(input_ids=torch.cat([ids, answer], 1)).logits[:, ids.shape[1] - 1 : -1]
            sums.append(float(torch.log_softmax(logits, -1).gather(-1, answer[..., None]).sum()))
        scores.append(sums)
        firsts.append(torch.softmax(logits[0, 0], -1))
    torch.testing.assert_close(found.scores, torch.tensor(scores), atol=1e-4, rtol=1e-4)
    likeliest = [task.options[each.index(max(each))] for each in scores]
    assert found.likeliest(task) == likeliest
    assert found.correct(task)["options"] == [each == "yes" for each in likeliest]
    torch.testing.assert_close(found.outputs, torch.stack(firsts).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_generated_is_what_generate_gives_for_each_prompt(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str, shared: int
) -> None:
    model, tokenizer = sys.modules["tasks"].load_model(str(saved[name]))
    head = model.get_output_embeddings()  # otherwise a random model answers the same to everything
    known = torch.arange(len(head.weight))[:, None] < len(tokenizer)
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape) * 10 * known)
    task = random_task(data, shared)
    usual = copy.deepcopy(model.generation_config)
    model.generation_config.update(repetition_penalty=9.0, num_beams=2, no_repeat_ngram_size=1, min_length=99)
    found = benchmark("evaluation").answer(model, tokenizer, task, "generate")
    model.generation_config = usual
    assert found.scores is None and not found.likeliest(task)
    for (prompt, _), text in zip(task.test, found.generated, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        new = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        new = new[0] if name == "t5" else new[0, ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == text
    task.test[0] = (task.test[0][0], f" {found.generated[0]} ")
    assert found.correct(task)["generate"][0] and set(found.correct(task)) == {"generate"}


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
def test_calibration_takes_a_preference_out(benchmark: Any, shares: list[float], fresh_seed: int) -> None:
    calibrated = benchmark("options").calibrated
    scores = torch.randn(50, 4, dtype=torch.float64) * 2
    chances = torch.softmax(scores, 1)  # by hand: each probability over its mean, times the share
    torch.testing.assert_close(calibrated(scores, shares).exp(), chances / chances.mean(0) * torch.tensor(shares))
    right = torch.arange(400) % 4
    biased = 6 * torch.nn.functional.one_hot(right, 4) + 0.1 * torch.randn(400, 4) + torch.tensor([9.0, 0, 0, 0])
    assert (biased.argmax(1) == 0).all() and (calibrated(biased, [0.25] * 4).argmax(1) == right).all()
