"""What a model answers in the continual benchmark, against one prompt and one option after another."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.tiny_tasks import WORDS
from tests.tiny_models import tiny

SENTENCES = ["yes", "no good", "what is the sky"]


def random_task(data: Path, shared: int, count: int = 25) -> Any:
    """Prompts of 1 to 9 words after `shared` that all have."""

    def words(number: int) -> list[str]:
        return [WORDS[i] for i in torch.randint(0, len(WORDS), (number,)).tolist()]

    beginning = words(shared)
    task = sys.modules["tasks"].read_task(data / "signs")
    task.options = SENTENCES
    task.test = [(" ".join([*beginning, *words(int(torch.randint(1, 10, ())))]), "yes") for _ in range(count)]
    return task


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_options_are_scored_as_one_after_another(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str, shared: int
) -> None:
    evaluation, tasks = benchmark("evaluation"), sys.modules["tasks"]
    model, tokenizer = tasks.load_model(str(saved[name]))
    task = random_task(data, shared)
    found = {score: evaluation.answer(model.eval(), tokenizer, task, score) for score in ("options", "both")}
    assert not found["options"].generated
    torch.testing.assert_close(found["options"].scores, found["both"].scores, atol=1e-5, rtol=1e-4)
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
    torch.testing.assert_close(found["both"].scores, torch.tensor(scores), atol=1e-4, rtol=1e-4)
    likeliest = [task.options[each.index(max(each))] for each in scores]
    assert found["both"].likeliest(task) == likeliest
    assert found["both"].correct(task)["options"] == [each == "yes" for each in likeliest]
    torch.testing.assert_close(found["both"].outputs, torch.stack(firsts).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_generated_is_what_generate_says_to_each_prompt(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str, shared: int
) -> None:
    model, tokenizer = sys.modules["tasks"].load_model(str(saved[name]))
    head = model.get_output_embeddings()  # else a random model says the same to everything
    known = torch.arange(len(head.weight))[:, None] < len(tokenizer)
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape) * 10 * known)
    task = random_task(data, shared)
    usual = copy.deepcopy(model.generation_config)
    model.generation_config.update(repetition_penalty=9.0, num_beams=2, no_repeat_ngram_size=1, min_length=99)
    found = benchmark("evaluation").answer(model, tokenizer, task, "generate")
    model.generation_config = usual  # what is asked for is exact match with the likeliest tokens
    assert found.scores is None and not found.likeliest(task)
    assert len(set(found.generated) - {""}) > (3 if name == "llama" else 0)
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


def test_a_cache_that_cannot_be_shared_is_done_without(
    benchmark: Any, data: Path, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, tasks = benchmark("evaluation"), sys.modules["tasks"]
    model, tokenizer = tasks.load_model(str(saved["llama"]))
    task = random_task(data, 10)
    found = evaluation.answer(model, tokenizer, task)
    monkeypatch.setattr(benchmark("beginning"), "is_plain", lambda cache: False)
    monkeypatch.setattr(benchmark("options"), "is_plain", lambda cache: False)
    other = evaluation.answer(model, tokenizer, task)
    assert found.generated == other.generated
    torch.testing.assert_close(found.scores, other.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.outputs, other.outputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
def test_calibration_takes_a_preference_out_and_nothing_else(
    benchmark: Any, shares: list[float], fresh_seed: int
) -> None:
    calibrated = benchmark("options").calibrated
    scores = torch.randn(50, 4, dtype=torch.float64) * 2
    # by hand: each probability over its mean, times the share
    chances = torch.softmax(scores, 1)
    by_hand = chances / chances.mean(0) * torch.tensor(shares)
    torch.testing.assert_close(calibrated(scores, shares).exp(), by_hand)
    # a preference added to answers that are nearly certain is taken out again, one after which all is the same is not
    right = torch.arange(400) % 4
    sure = 6 * torch.nn.functional.one_hot(right, 4) + 0.1 * torch.randn(400, 4)
    biased = sure + torch.tensor([9.0, 0.0, 0.0, 0.0])
    assert (biased.argmax(1) == 0).all() and (calibrated(biased, [0.25] * 4).argmax(1) == right).all()
    lost = torch.tensor([9.0, 0.0, 0.0, 0.0]).expand(400, 4)
    assert (calibrated(lost, shares).argmax(1) == 0).float().mean() in (0.0, 1.0)


def test_answers_after_calibration(benchmark: Any, data: Path) -> None:
    task = sys.modules["tasks"].read_task(data / "signs")
    task.options, task.train = ["yes", "no"], [("?", "yes")] * 2 + [("?", "no")] * 2
    task.test = [("1", "yes"), ("2", "no"), ("3", "no"), ("4", "yes")]
    scores = torch.tensor([[-0.1, -3.0], [-0.1, -1.0], [-0.1, -1.5], [-0.1, -4.0]])  # "yes" is said to all
    found = benchmark("evaluation").Answers([], scores, torch.zeros(1)).correct(task)
    assert found == {"options": [True, False, False, True], "calibrated": [True] * 4}
    task.train = [("?", "yes")] * 400  # where hardly any answer is "no", saying yes to all is no preference
    found = benchmark("evaluation").Answers([], scores, torch.zeros(1)).correct(task)
    assert found["calibrated"] == found["options"]


def test_a_window_or_a_state_is_not_shared(benchmark: Any) -> None:
    cache_of = benchmark("beginning").cache_of
    assert cache_of(tiny("llama"), range(9)).get_seq_length() == 9
    assert cache_of(tiny("mistral", sliding_window=4), range(9)) is None


def test_what_prompts_have_in_common(benchmark: Any) -> None:
    common = benchmark("beginning").common
    rows = [[*range(12), 1], [*range(12), 2, 3]]
    assert common(rows, 99) == 12 and common(rows, 10) == 10 and common(rows, 7) == 0
    assert common([[1, 2], [2, 1]], 9) == 0 and common(rows, -1) == 0
