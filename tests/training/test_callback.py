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
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
)

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
    assert "No attribution vector is stored with 'first'" in message and reason in message
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


def test_a_run_that_diverged_ends_as_any_other_with_a_warning(tmp_path: Path) -> None:
    class Diverges(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(torch.nan)

    model = first()
    options = arguments(tmp_path, max_steps=2)
    trainer = ASOTrainer(model=model, args=options, train_dataset=rows(10, 7), callbacks=[Diverges()])
    (message,) = said(trainer)
    assert "No attribution vector is stored with 'first'" in message and "NaN or Inf" in message
    assert trainer.state.global_step == 2 and model.base_model.attribution == {}


def albert() -> Any:
    """A model that runs its feed-forward layer several times, of which attribution knows only when it tries."""
    config = AlbertConfig(
        vocab_size=64, hidden_size=16, embedding_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    settings = ASOLoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"], attribution=QUICK)
    return get_peft_model(AlbertForSequenceClassification(config), settings, adapter_name="first")


def without_embeddings() -> Any:
    """A model that cannot say what its embeddings are, as those of speech and of pictures."""
    model = first()

    def unknown() -> Any:
        raise NotImplementedError("get_input_embeddings not auto-handled")

    model.get_base_model().get_input_embeddings = unknown
    return model


@pytest.mark.parametrize(
    ("make", "reason"), [(albert, "ran 2 times in one forward pass"), (without_embeddings, "not auto-handled")]
)
def test_a_model_that_attribution_cannot_run_is_found_out_before_the_first_step(
    tmp_path: Path, make: Any, reason: str
) -> None:
    model = make()
    data = rows(10, 7) if make is without_embeddings else rows(labels=lambda ids: ids[0] % 3)
    trainer = ASOTrainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=data)
    message = said(trainer)[-1]  # where there is a fast way, one that says why not that one comes first
    assert "No attribution vector is stored with 'first'" in message and reason in message
    assert trainer.state.global_step == 2
    model.add_adapter("second", ASOLoraConfig(r=2, target_modules=list(model.peft_config["first"].target_modules)))
    model.set_adapter("second")
    second = ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match=f"{reason}.*similarity='none'.*penalty_weight=0"):
        second.train()
    assert second.state.global_step == 0


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
