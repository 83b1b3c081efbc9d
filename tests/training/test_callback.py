"""When attribution runs, on which examples, and what happens where it cannot read the task."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader, IterableDataset, default_collate
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig, update_coefficients
from peft_aso.training.callback import choose_probe
from tests.tiny_models import tiny
from tests.training.tools import QUICK, TinyTask, arguments, chain, tokenizer, train

TARGETS = r".*\.(q_proj|v_proj|query|value)"


def rows(length: int = 10, prompt: int = 0, labels: Any = None) -> list[dict[str, torch.Tensor]]:
    """Examples whose labels are the tokens after the prompt, or what `labels` makes of the tokens."""
    found = []
    for ids in torch.randint(3, 64, (8, length)):
        answer = torch.where(torch.arange(length) < prompt, -100, ids) if labels is None else labels(ids)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": answer})
    return found


def first(base: Any = None, attribution: AttributionConfig = QUICK) -> Any:
    """A model whose first task is about to be trained."""
    settings = ASOLoraConfig(r=2, target_modules=TARGETS, attribution=attribution)
    return get_peft_model(base or tiny("llama"), settings, adapter_name="first")


def second(model: Any, attribution: AttributionConfig) -> Any:
    model.add_adapter("second", ASOLoraConfig(r=2, target_modules=TARGETS, attribution=attribution))
    model.set_adapter("second")
    return model


def trainer_of(model: Any, folder: Path, data: Any, **settings: Any) -> ASOTrainer:
    return ASOTrainer(model=model, args=arguments(folder, max_steps=2), train_dataset=data, **settings)


def warned(trainer: ASOTrainer) -> list[str]:
    """The training's warnings about attribution."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(each.message) for each in caught if "attribution" in str(each.message)]


@pytest.mark.parametrize(
    ("refresh", "steps"), [(0, [0]), (1.0, [0]), (1, [0, 1, 2, 3]), (2, [0, 2]), (0.25, [0, 1, 2, 3]), (0.5, [0, 2])]
)
def test_psi_is_updated_before_the_first_step_and_every_refresh(tmp_path: Path, refresh: float, steps: Any) -> None:
    """A float up to 1 is a fraction of the run. psi of the newest earlier task is 1 until the first refresh."""
    psi: list[float] = []
    w: list[float] = []

    class Record(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            psi.append(kwargs["model"].base_model.soft_coefficients["first"])
            w.append(kwargs["model"].peft_config["second"].similarities["first"])

    train(chain(attribution=replace(QUICK, refresh=refresh)), tmp_path, more={"callbacks": [Record()]})
    assert [0, *(step for step in range(1, 4) if w[step] != w[step - 1])] == steps
    assert w[0] == pytest.approx(1.0, abs=1e-6), "B = 0: the model of the first task"
    first_refresh = [*steps, 4][1]
    assert psi == [1.0] * first_refresh + [pytest.approx(1 - each) for each in w[first_refresh:]]
    assert all(0 < each < 1 for each in psi[first_refresh:])


def test_lambda_zero_and_similarity_none_leave_psi_at_one(tmp_path: Path) -> None:
    free, hard = chain(penalty_weight=0.0), chain(penalty="l1", attribution=AttributionConfig(similarity="none"))
    train(free, tmp_path)
    log = train(hard, tmp_path).state.log_history
    assert free.base_model.soft_coefficients == hard.base_model.soft_coefficients == {"first": 1.0}
    assert log[0]["orthogonality_penalty"] > 0
    assert set(free.base_model.attribution) == {"second"} and not hard.base_model.attribution


def test_the_stored_vector_is_the_mean_over_the_probe(tmp_path: Path) -> None:
    model, data = chain(), TinyTask(tiny("llama"))
    train(model, tmp_path, data, max_steps=2)
    vector = model.base_model.attribution["second"]
    mean = update_coefficients(model, choose_probe(DataLoader(data), 4, seed=3)).vector.mean_vector()
    torch.testing.assert_close(vector, mean.cpu(), rtol=1e-3, atol=1e-6 * mean.abs().max().item())
    assert vector.shape == (model.peft_config["second"].attribution_layout[-1][2],)


UNREADABLE = {
    "long answers": (first, lambda: rows(90, 10), "max_answer_tokens=64"),
    "labels on the prompt": (first, rows, "labels on every token"),
    "experts": (lambda: first(tiny("mixtral")), lambda: rows(10, 7), "mixture of experts"),
    "a regression": (
        lambda: first(tiny("bert", num_labels=1)), lambda: rows(labels=lambda _: torch.rand(())), "regression"
    ),
    "no such stack": (lambda: first(attribution=replace(QUICK, stacks="decoder")), lambda: rows(10, 7), "stack"),
    "a layer that runs again": (lambda: first(tiny("albert")), lambda: rows(labels=lambda ids: ids[0] % 3), "3 times"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_task_gives_a_warning_or_an_error_where_psi_needs_it(tmp_path: Path, case: str) -> None:
    make, data, reason = UNREADABLE[case]
    model, data = make(), data()
    trainer = trainer_of(model, tmp_path, data)
    message = warned(trainer)[-1]
    assert "No attribution vector is stored with 'first'" in message and reason in message
    assert trainer.state.global_step == 2 and model.base_model.attribution == {}
    trainer = trainer_of(second(model, model.peft_config["first"].attribution), tmp_path, data)
    with pytest.raises(ValueError, match=f"{reason}.*similarity='none'.*penalty_weight=0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_data_that_the_collator_cannot_put_into_batches_are_named(tmp_path: Path) -> None:
    data = [{name: value[: 10 - index % 3] for name, value in row.items()} for index, row in enumerate(rows(10, 5))]
    given: list[dict[str, Any]] = [{}, {"processing_class": tokenizer()}]
    for settings in given:
        for model in (first(), second(first(), QUICK)):
            with pytest.raises(ValueError, match="pass a collator that pads") as error:
                trainer_of(model, tmp_path, data, **settings).train()
            assert "cannot read" not in str(error.value)
    padded = trainer_of(first(), tmp_path, data, data_collator=DataCollatorForSeq2Seq(tokenizer()))
    assert warned(padded) == [] and padded.state.global_step == 2


def test_a_readable_task_gives_no_warning_and_stored_vectors_are_needed(tmp_path: Path) -> None:
    model = first()
    assert warned(trainer_of(model, tmp_path, rows(10, 7))) == []
    model.base_model.attribution.clear()
    config = second(model, replace(QUICK, source="stored")).peft_config["second"]
    with pytest.raises(ValueError, match="'first' has none.*could not read"):
        trainer_of(model, tmp_path, rows(10, 7)).train()
    config.penalty_weight = 0.0
    with pytest.raises(ValueError, match="labels on every token"):
        trainer_of(model, tmp_path, rows()).train()
    for attribution, count in ((QUICK, 1), (replace(QUICK, similarity="none"), 0)):
        config.attribution = attribution
        assert len(warned(trainer_of(model, tmp_path, rows()))) == count


def test_a_run_that_diverged_ends_with_a_warning(tmp_path: Path) -> None:
    class Diverges(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(torch.nan)

    model = first()
    (message,) = warned(trainer_of(model, tmp_path, rows(10, 7), callbacks=[Diverges()]))
    assert "No attribution vector is stored with 'first'" in message and model.base_model.attribution == {}


def probe(data: Any, size: int, seed: int = 0, collate: Any = default_collate) -> list[dict[str, Any]]:
    return choose_probe(DataLoader(data, batch_size=4, collate_fn=collate), size, seed)


def test_same_seed_same_probe_and_no_random_number_is_used_up() -> None:
    data = TinyTask(tiny("llama"), size=30)

    def collate(examples: Any) -> Any:
        torch.rand(3), np.random.rand(), random.random()
        return default_collate(examples)

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    one, again, other = probe(data, 20, 1, collate), probe(data, 20, 1), probe(data, 20, 2)
    assert [len(batch["labels"]) for batch in one] == [16, 4]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_examples_without_answer_are_passed_over_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    data = TinyTask(tiny("llama"), size=12)
    data.batch["labels"][:9] = -100
    (batch,) = probe(data, 8)
    assert len(batch["labels"]) == 3 and ((batch["labels"] != -100).sum(1) > 0).all()
    data.batch["labels"][:] = -100
    trainer = trainer_of(first(), tmp_path, data)
    with pytest.raises(ValueError, match="all labels are -100"):
        trainer.train()
    assert trainer.state.global_step == 0
    del data.batch["labels"]
    with pytest.raises(ValueError, match="have no `labels`"):
        probe(data, 4)


def test_a_stream_gives_its_first_examples_and_stays_open() -> None:
    data = TinyTask(tiny("llama"), size=8)

    class Once(IterableDataset):
        rows = (data[index] for index in range(len(data)))

        def __iter__(self) -> Any:
            return self.rows

    stream = Once()
    (batch,) = probe(stream, 4)
    assert torch.equal(batch["input_ids"], data.batch["input_ids"][:4]) and len(list(stream)) == 4


@pytest.mark.parametrize("width", [5, 20])
def test_a_collator_that_draws_the_answers_leaves_no_row_without_one(width: int, fresh_seed: int) -> None:
    """Masked language modelling at 15%: a row that had an answer alone may have none in its batch."""

    def masked(examples: list[torch.Tensor]) -> dict[str, Any]:
        ids = torch.stack(examples)
        labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
        return {"input_ids": ids, "labels": labels, "scale": torch.tensor(2.0), "weights": torch.ones(9), "text": "x"}

    data, seed = torch.arange(100)[:, None].expand(100, width), fresh_seed % 1000
    one, again = probe(data, 12, seed, masked), probe(data, 12, seed, masked)
    ids = torch.cat([batch["input_ids"] for batch in one])
    assert len(ids) == 12 and len(ids[:, 0].unique()) == 12
    for batch, same in zip(one, again, strict=True):
        answers = batch["labels"] != -100
        assert answers.any(1).all() and torch.equal(batch["labels"][answers], batch["input_ids"][answers])
        assert torch.equal(batch["labels"], same["labels"])
        assert batch["scale"] == 2 and len(batch["weights"]) == 9 and batch["text"] == "x"
