"""Attribution on a real model: SmolLM2-135M, all 30 layers, against Captum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attribution.reference import captum_scores, largest_gap, run

QUESTIONS = (("Question: What is the capital of France?\nAnswer:", " Paris"), ("2 + 2 =", " 4, of course"))


def batch_of(tokenizer: Any, side: str) -> dict[str, torch.Tensor]:
    texts = [prompt + answer for prompt, answer in QUESTIONS]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    mask = batch["attention_mask"]
    answers = [len(tokenizer(answer, add_special_tokens=False).input_ids) for _, answer in QUESTIONS]
    from_the_end = mask.flip(1).cumsum(1).flip(1)
    answered = (mask == 1) & (from_the_end <= torch.tensor(answers)[:, None])
    return {**batch, "labels": batch["input_ids"].masked_fill(~answered, -100)}


@pytest.mark.slow
def test_scores_are_captums_on_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from tasks import load_model

    model, tokenizer = load_model("smollm2")
    model.double().eval()  # in float32 the softmax over 49,152 tokens rounds P by up to 5e-5, in every engine
    for side in ("right", "left"):
        batch = batch_of(tokenizer, side)
        assert sorted((batch["labels"] != -100).sum(1).tolist()) == [1, 5]
        ours = run(model, batch, "fast", steps=5)
        assert ours.scores.shape == (2, 30 * 1536)
        assert largest_gap(ours.scores, captum_scores(model, batch, steps=5)) <= 1e-5
