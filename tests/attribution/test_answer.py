"""What the answer of a batch is and where it is predicted; every refusal and its message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_aso.attribution import AttributionConfig, attribute, read_batch
from peft_aso.attribution.answer import is_causal, log_probability
from tests.tiny_models import CAUSAL, CLASSIFIERS, VOCAB, tiny, tiny_batch

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8], [-100, 10, -100, -100]])


def changed(**values: Any) -> dict[str, Any]:
    batch = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": LABELS, **values}
    return {name: value for name, value in batch.items() if value is not None}


def test_causal_positions_are_those_that_predict() -> None:
    read = read_batch(tiny("llama"), changed(length=torch.tensor([4, 2])))
    assert read.kind == "causal" and set(read.inputs) == {"input_ids", "attention_mask"}
    assert read.positions["single"].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert read.targets.tolist() == [[-100, 7, 8, -100], [10, -100, -100, -100]]


def test_seq2seq_positions() -> None:
    model = tiny("t5")
    batch = tiny_batch(model, 3)
    read = read_batch(model, batch)
    assert read.kind == "seq2seq" and read.inputs["decoder_input_ids"].shape == batch["labels"].shape
    assert torch.equal(read.positions["decoder"], batch["labels"] != -100)
    assert torch.equal(read.positions["encoder"], batch["attention_mask"].bool())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [*CLASSIFIERS, "bert_mlm", "llama_classifier"])
def test_bidirectional_models_use_every_token_and_causal_classifiers_the_pooled_one(name: str, padding: str) -> None:
    model = tiny(name)
    batch = tiny_batch(model, 4, padding=padding)
    read, expected = read_batch(model, batch), batch["attention_mask"].bool()
    if name == "llama_classifier":
        places = torch.arange(expected.shape[1])
        expected = places == (places * expected).argmax(1, keepdim=True)
    assert read.kind == ("token" if name == "bert_mlm" else "sequence")
    assert torch.equal(read.targets, batch["labels"])
    assert torch.equal(read.positions["single"], expected)


def test_causal_or_not_is_observed() -> None:
    assert [name for name in (*CAUSAL, *CLASSIFIERS, "bert_mlm") if is_causal(tiny(name))] == list(CAUSAL)


NO_ANSWER = "No label of the batch is an answer token"
EVERY_TOKEN = "Row 1 has labels on every token.*prompt to -100"
RESTART = "position_ids of row 0 restart.*one example per row"
OUT_OF_RANGE = f"Label {VOCAB} is out of range: LlamaForCausalLM has {VOCAB} ids"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"labels": None}, "no `labels` tensor"),
    ("llama", {"labels": torch.full((2, 4), -100)}, NO_ANSWER),
    ("llama", {"labels": torch.tensor([[5, -100, -100, -100]] * 2)}, NO_ANSWER),
    ("llama", {"labels": torch.tensor([[-100, -100, 7, 8], [-100] * 4])}, "Row 1 has no answer token"),
    ("llama", {"labels": torch.tensor([[-100, -100, 7, 8], [9, 10, -100, -100]])}, EVERY_TOKEN),
    ("llama", {"labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, 3, 4]])}, "Row 1 has labels on padding"),
    ("llama", {"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}, RESTART),
    ("llama", {"cu_seq_lens_q": torch.tensor([0, 4])}, "packed or padding-free.*cu_seq_lens_q"),
    ("llama", {"labels": torch.zeros(2)}, "regression or a multi-label"),
    ("llama", {"labels": torch.where(LABELS == 8, VOCAB, LABELS)}, OUT_OF_RANGE),
    ("llama", {"labels": torch.where(LABELS == 8, -1, LABELS)}, "Label -1 is out of range"),
    ("llama", {"labels": torch.tensor([[-100, 3], [-100, 3]])}, "differ in shape"),
    ("llama", {"labels": torch.zeros(2, 4, 1).long()}, "labels must be"),
    ("llama", {"input_ids": None}, "neither input_ids nor inputs_embeds"),
    ("bert", {"labels": torch.tensor([0, 3])}, "Label 3 is out of range: BertForSequenceClassification has 3 classes"),
    ("bert", {"labels": torch.tensor([0, -100])}, "label of row 1 is -100"),
    ("bert", {"labels": torch.zeros(2, 3)}, "regression"),
    ("bert", {"labels": torch.tensor([0, 1, 2])}, r"labels \(3,\) and examples \(2,\) differ"),
    ("t5", {"labels": torch.tensor([0, 1])}, "ForConditionalGeneration"),
    ("t5", {"labels": LABELS, "decoder_input_ids": torch.ones(2, 5).long()}, "differ in shape"),
]


@pytest.mark.parametrize(("name", "values", "message"), REFUSED)
def test_refused_before_the_model_runs(name: str, values: dict[str, Any], message: str) -> None:
    model, calls = tiny(name), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        attribute(model, changed(**values), AttributionConfig(steps=2))
    assert not calls


def test_a_regression_has_no_answer() -> None:
    with pytest.raises(ValueError, match="regression"):
        read_batch(tiny("bert", num_labels=1), changed(labels=torch.tensor([0, 0])))


def test_left_padded_position_ids_are_no_packing() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 3, padding="left")
    ids = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    read_batch(model, {**batch, "position_ids": ids})


def test_long_answers_need_a_higher_cap() -> None:
    model = tiny("llama")
    ids = torch.randint(3, VOCAB, (1, 9))
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(9) < 3, -100, ids)}
    read_batch(model, batch, max_answer_tokens=6)
    with pytest.raises(ValueError, match=r"more answer tokens than max_answer_tokens=5.*-100.*raise"):
        read_batch(model, batch, max_answer_tokens=5)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_log_probability_and_its_gradient_are_log_softmaxs(unlabelled: bool, fresh_seed: int) -> None:
    logits = (torch.randn(3, 4, 11) * 5).requires_grad_()
    targets = torch.randint(0, 11, (3, 4))
    if unlabelled:
        targets[0, 1] = targets[2, 3] = -100
    weights = torch.rand(3)
    found = log_probability(logits, targets)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    logs = torch.log_softmax(logits.double(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = (logs * (targets != -100)).sum(1)
    (reference,) = torch.autograd.grad((expected * weights.double()).sum(), logits)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(gradient, reference, atol=1e-6)
    assert log_probability(logits.bfloat16(), targets).dtype == torch.float32
    classes = log_probability(logits[:, 0], torch.tensor([3, 0, 1]))
    assert torch.allclose(classes, logits[:, 0].log_softmax(-1)[torch.arange(3), [3, 0, 1]])
