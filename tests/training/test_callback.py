"""What attribution cannot read is said before the first step: as an error where psi needs it, else as one warning."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer

from peft_aso import ASOLoraConfig, ASOTrainer, ASOTrainerMixin, AttributionConfig
from tests.tiny_models import tiny
from tests.training.test_sft import tokenizer
from tests.training.tools import QUICK, arguments, chain, largest_difference, weights


class Rows(Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def rows(length: int = 10, prompt: int = 0, labels: Any = None) -> Rows:
    """Examples whose labels are the tokens after the prompt, or what `labels` makes of the tokens."""
    found = []
    for ids in torch.randint(3, 64, (8, length)):
        answer = ids.clone() if labels is None else labels(ids)
        if labels is None:
            answer[:prompt] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": answer})
    return Rows(found)


def first(name: str = "llama", attribution: AttributionConfig = QUICK, **settings: Any) -> Any:
    targets = {"mixtral": ["q_proj", "v_proj"]}.get(name)
    kind = None if name == "bert" else "CAUSAL_LM"
    config = ASOLoraConfig(r=2, task_type=kind, target_modules=targets, attribution=attribution)
    return get_peft_model(tiny(name, max_position_embeddings=128, **settings), config, adapter_name="first")


def said(trainer: Any) -> list[str]:
    """The training's warnings about attribution."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(each.message) for each in caught if "attribution" in str(each.message)]


UNREADABLE = {
    "long answers": (lambda: (first(), rows(90, 10)), "more than max_answer_tokens=64"),
    "labels on the prompt": (lambda: (first(), rows()), "labels on every token"),
    "experts": (lambda: (first("mixtral"), rows(10, 7)), "mixture of experts"),
    "regression": (lambda: (first("bert", num_labels=1), rows(labels=lambda _: torch.rand(()))), "a regression"),
    "no such stack": (lambda: (first(attribution=replace(QUICK, stacks="decoder")), rows(10, 7)), "stacks='all'"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_task_that_attribution_cannot_read_is_trained_with_one_warning(tmp_path: Path, case: str) -> None:
    make, reason = UNREADABLE[case]
    model, data = make()
    trainer = ASOTrainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=data)
    (message,) = said(trainer)
    assert "No attribution vector will be stored with 'first'" in message and reason in message
    assert "source='stored'" in message and "max_answer_tokens" in message
    assert trainer.state.global_step == 2 and model.base_model.attribution == {}


def test_a_later_task_that_needs_the_vector_says_why_it_is_missing(tmp_path: Path) -> None:
    model = first()
    said(ASOTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows()))
    model.add_adapter("second", ASOLoraConfig(r=2, attribution=replace(QUICK, source="stored")))
    model.set_adapter("second")
    second = ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(10, 7))
    with pytest.raises(ValueError, match="'first' has none.*could not read"):
        second.train()


@pytest.mark.parametrize(("weight", "raises"), [(0.0, False), (0.05, True)])
@pytest.mark.parametrize("source", ["current", "stored"])
def test_the_error_comes_first_where_a_psi_needs_the_vector(
    tmp_path: Path, weight: float, raises: bool, source: str
) -> None:
    model = chain(penalty_weight=weight, attribution=replace(QUICK, source=source))
    before = weights(model, "second")
    trainer = ASOTrainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows())
    if raises or source == "stored":
        with pytest.raises(ValueError, match="labels on every token"):
            trainer.train()
        assert trainer.state.global_step == 0
        assert largest_difference(before, weights(model, "second")) == 0
    else:
        assert len(said(trainer)) == 1 and trainer.state.global_step == 2


def test_a_resumed_run_is_refused_before_its_next_step_as_well(tmp_path: Path) -> None:
    options = dict(max_steps=6, save_strategy="steps", save_steps=2)
    model = chain(attribution=replace(QUICK, refresh=5))
    trainer = ASOTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows(10, 7))
    trainer.train()
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    resumed = ASOTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows())
    with pytest.raises(ValueError, match="labels on every token"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 2


def test_without_attribution_nothing_is_said(tmp_path: Path) -> None:
    model = first(attribution=replace(QUICK, similarity="none"))
    assert said(ASOTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows())) == []
    readable = first()
    assert said(ASOTrainer(model=readable, args=arguments(tmp_path, max_steps=1), train_dataset=rows(10, 7))) == []
    assert readable.base_model.attribution["first"].any()


def test_a_first_task_may_have_no_labels_at_all(tmp_path: Path) -> None:
    class Energy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.logits.square().mean(), outputs) if return_outputs else outputs.logits.square().mean()

    class Own(ASOTrainerMixin, Energy):
        pass

    data = Rows([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows().rows])
    model = first()
    (message,) = said(Own(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data))
    assert "have no `labels`" in message and ".." not in message


def test_another_error_at_the_end_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_aso.training.coefficients as module

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("NaN in the result")

    monkeypatch.setattr(module, "compute_attribution", broken)
    trainer = ASOTrainer(model=first(), args=arguments(tmp_path, max_steps=1), train_dataset=rows(10, 7))
    with pytest.raises(ValueError, match="NaN in the result"):
        trainer.train()


@pytest.mark.parametrize("seed", range(4))
def test_masked_language_models_are_trained_on_short_texts(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = dict(r=2, attribution=replace(QUICK, probe_size=8), target_modules=["query", "value"])
    model = get_peft_model(tiny("bert_mlm"), ASOLoraConfig(**config), adapter_name="first")
    model.add_adapter("second", ASOLoraConfig(**config))
    model.set_adapter("second")
    words = tokenizer()
    words.add_special_tokens({"mask_token": "<mask>"})
    data = Rows([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows(8).rows * 4])
    trainer = ASOTrainer(
        model=model, args=arguments(tmp_path, max_steps=1, seed=seed), train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(words),
    )  # fmt: skip
    trainer.train()
    assert model.base_model.attribution["second"].any()
