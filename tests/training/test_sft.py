"""`ASOSFTTrainer` on TRL's kinds of data, against the penalty and TRL's own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft_aso
from peft_aso import ASOLoraConfig, AttributionConfig
from tests.tiny_models import tiny

WORDS = ["what", "is", "the", "sky", "grass", "blue", "green", "user", "assistant", ":", "yes", "no"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> {% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )


def data(kind: str) -> Any:
    pairs = [("what is the sky", "blue"), ("what is the grass", "green yes"), ("the sky is the sky", "yes")] * 2
    if kind == "text":
        rows = [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in pairs]
    else:
        rows = [
            {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": a}]}
            for p, a in pairs
        ]
    return datasets.Dataset.from_list(rows)


def chain(**attribution: Any) -> Any:
    """Two tasks, the first random; the second is about to be trained."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "penalty_weight": 0.5}
    config = AttributionConfig(steps=4, probe_size=2, **attribution)
    model = get_peft_model(tiny("llama"), ASOLoraConfig(**settings, attribution=config), adapter_name="first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.add_adapter("second", ASOLoraConfig(**settings, attribution=config))
    model.set_adapter("second")
    return model


def arguments(folder: Path, **more: Any) -> Any:
    return trl.SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        save_strategy="no", learning_rate=1e-2, use_cpu=True, bf16=False, gradient_checkpointing=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_a_task_is_trained_on_trls_data(tmp_path: Path, kind: str) -> None:
    model = chain()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = peft_aso.ASOSFTTrainer(
        model=model, args=arguments(tmp_path), train_dataset=data(kind), processing_class=tokenizer()
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(logs) == 3 and all(entry["orthogonality_penalty"] > 0 for entry in logs[1:])
    assert set(model.base_model.soft_coefficients) == {"first"}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(".second." in name for name in moved)
    assert "second" in model.base_model.attribution


def test_a_starts_from_the_inputs_of_trls_data(tmp_path: Path) -> None:
    model = chain()
    model.peft_config["second"].project_init = "inputs"
    trainer = peft_aso.ASOSFTTrainer(
        model=model, args=arguments(tmp_path), train_dataset=data("conversation"), processing_class=tokenizer()
    )
    trainer.args.learning_rate = 0.0
    trainer.train()
    for layer in model.base_model.lora_layers().values():
        new, old = layer.lora_A["second"].weight.detach(), layer.lora_A["first"].weight.detach()
        torch.testing.assert_close(new @ new.T, torch.eye(2), atol=1e-5, rtol=0)
        assert (new @ old.T).abs().max() < 1e-5


def test_the_loss_is_trls_and_the_penalty(tmp_path: Path) -> None:
    model = chain(similarity="none")
    stock, ours = (
        kind(model=model, args=arguments(tmp_path), train_dataset=data("text"), processing_class=tokenizer())
        for kind in (trl.SFTTrainer, peft_aso.ASOSFTTrainer)
    )
    ours.current_gradient_accumulation_steps = stock.current_gradient_accumulation_steps = 1
    batch = next(iter(ours.get_train_dataloader()))
    labels = batch["labels"]
    said = set(labels[labels != -100].tolist())
    assert (labels == -100).any() and said <= {1, 8, 9, 13}, "completions and their end"
    model.train()
    count = (labels[:, 1:] != -100).sum()
    plain = stock.compute_loss(model, dict(batch), num_items_in_batch=count)
    loss = ours.compute_loss(model, dict(batch), num_items_in_batch=count)
    penalty = model.base_model.orthogonality_penalty()
    assert loss.item() == pytest.approx(plain.item() + 0.5 * penalty.item(), rel=1e-5)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    ours.compute_loss(model, dict(batch), num_items_in_batch=count)
    hook.remove()
    assert len(calls) == 1, "no second pass for outputs that nobody asked for"


def test_accumulation_is_trls_and_its_records_hold_the_training_alone(tmp_path: Path) -> None:
    """Looking at the loss, once a run, is no pass of the training: TRL counts the tokens of those."""
    found = []
    for kind in (trl.SFTTrainer, peft_aso.ASOSFTTrainer):
        torch.manual_seed(0)
        model = chain(similarity="none")
        model.peft_config["second"].penalty_weight = 0.0
        args = arguments(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.0)
        trainer = kind(model=model, args=args, train_dataset=data("text"), processing_class=tokenizer())
        trainer.train()
        records = [
            {name: entry[name] for name in ("loss", "num_tokens", "mean_token_accuracy", "entropy")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        trained = [each.detach() for name, each in model.named_parameters() if ".second." in name]
        found.append((records, trained))
    assert len(found[0][0]) == 3 and found[0][0] == found[1][0]
    for stock, ours in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-6, rtol=0)
    assert trainer._ignores_item_count is False


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    given = {"train_dataset": data("text"), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match="get_peft_model"):
        peft_aso.ASOSFTTrainer(tiny("llama"), arguments(tmp_path), peft_config=ASOLoraConfig(r=2), **given)
    with pytest.raises(ValueError, match="several examples into one row"):
        peft_aso.ASOSFTTrainer(chain(), arguments(tmp_path, packing=True), **given)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        peft_aso.Nothing  # noqa: B018
