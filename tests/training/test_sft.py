"""`ASOSFTTrainer` on TRL's kinds of data, against the penalty and TRL's own trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl

import peft_aso
from peft_aso import ASOLoraConfig, AttributionConfig
from tests.tiny_models import tiny
from tests.training import tools
from tests.training.tools import tokenizer, weights

PAIRS = [("what is the sky", " blue"), ("what is the grass", " green yes"), ("the sky is the sky", " yes")] * 2


def data(kind: str = "text") -> Any:
    def said(role: str, words: str) -> Any:
        return words if kind == "text" else [{"role": role, "content": words}]

    rows = [{"prompt": said("user", prompt), "completion": said("assistant", answer)} for prompt, answer in PAIRS]
    return datasets.Dataset.from_list(rows)


def chain(**settings: Any) -> Any:
    return tools.chain(**{"penalty_weight": 0.5, "attribution": AttributionConfig(steps=4, probe_size=2), **settings})


def trainer_of(model: Any, folder: Path, rows: Any, kind: Any = peft_aso.ASOSFTTrainer, **settings: Any) -> Any:
    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        **{"learning_rate": 1e-2, **settings},
    )  # fmt: skip
    return kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer())


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_a_task_is_trained_on_trls_data(tmp_path: Path, kind: str) -> None:
    model = chain()
    before = weights(model, "first")
    trainer = trainer_of(model, tmp_path, data(kind))
    batch = next(iter(trainer.get_train_dataloader()))
    answers = set(batch["labels"][batch["labels"] != -100].tolist())
    assert (batch["labels"] == -100).any() and answers <= {1, 8, 9, 13}, "completions and their end"
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(logs) == 3 and all(entry["orthogonality_penalty"] > 0 for entry in logs)
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * entry["orthogonality_penalty"], rel=1e-4)
    assert set(model.base_model.soft_coefficients) == {"first"} and "second" in model.base_model.attribution
    assert tools.distance(before, weights(model, "first")) == 0
    assert all(value.any() for name, value in weights(model, "second").items() if "lora_B" in name)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0}])
def test_without_a_penalty_it_is_trls_trainer_bit_for_bit(tmp_path: Path, settings: Any) -> None:
    """The weights, and TRL's own records: no pass is added to the training's."""
    found = []
    for kind in (trl.SFTTrainer, peft_aso.ASOSFTTrainer):
        model = chain(penalty_weight=0.0, attribution=AttributionConfig(similarity="none"))
        trainer = trainer_of(model, tmp_path, data(), kind, **settings)
        trainer.train()
        names = ("loss", "num_tokens", "mean_token_accuracy", "entropy")
        records = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]
        found.append((records, weights(model, "second")))
    (stock, their_weights), (ours, our_weights) = found
    assert len(ours) == 3 and stock == ours
    assert tools.distance(their_weights, our_weights) == 0


def test_chat_messages_need_assistant_only_loss(tmp_path: Path) -> None:
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": r, "content": c.strip()} for r, c in zip(roles, pair, strict=True)]} for pair in PAIRS
    ]
    messages = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match="assistant_only_loss=True"):
        trainer_of(chain(), tmp_path, messages).train()
    trainer = trainer_of(chain(), tmp_path, messages, assistant_only_loss=True)
    trainer.train()
    assert trainer.state.global_step == 3


def test_packed_data_and_a_peft_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="get_peft_model"):
        peft_aso.ASOSFTTrainer(tiny("llama"), None, peft_config=ASOLoraConfig(r=2), train_dataset=data())
    for settings in ({"packing": True}, {"padding_free": True}):
        with pytest.raises(ValueError, match="several examples into one row"):
            trainer_of(chain(), tmp_path, data(), **settings)


def test_without_trl_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(vars(sys.modules["peft_aso.training.trainer"]), "ASOSFTTrainer", raising=False)
    with pytest.raises(ImportError, match=r"pip install \"peft-aso\[trl\]\""):
        peft_aso.ASOSFTTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        peft_aso.Nothing  # noqa: B018
