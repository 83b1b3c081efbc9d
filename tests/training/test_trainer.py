"""The Trainer: what the penalty does to the loss, and what accumulation, resuming and saving must not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_aso import ASOLoraConfig, ASOSeq2SeqTrainer, ASOTrainer, AttributionConfig, HistoryError
from tests.tiny_models import tiny
from tests.training.tools import (
    QUICK,
    TinyTask,
    arguments,
    chain,
    config,
    largest_difference,
    randomize,
    train,
    weights,
)


class Kill(TrainerCallback):
    """Stops the process (as far as the test is concerned) after a number of steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


def test_the_first_task_is_plain_lora_bit_for_bit(tmp_path: Path) -> None:
    results = []
    for settings, trainer_class in ((LoraConfig, Trainer), (ASOLoraConfig, ASOTrainer)):
        torch.manual_seed(5)
        lora = settings(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM")
        model = get_peft_model(tiny("llama"), lora, adapter_name="first")
        trainer = trainer_class(model=model, args=arguments(tmp_path, max_steps=10), train_dataset=TinyTask(model))
        trainer.train()
        results.append(weights(model, "first"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(value.abs().sum() > 0 for name, value in results[0].items() if "lora_B" in name)


def test_training_leaves_the_history_bit_for_bit(tmp_path: Path) -> None:
    model = chain(tasks=("one", "two", "new"), lora_dropout=0.1, l2_weight=0.1)
    before = {name: weights(model, name) for name in ("one", "two")}
    started = weights(model, "new")
    train(model, tmp_path)
    for name, values in before.items():
        assert all(torch.equal(values[key], value) for key, value in weights(model, name).items())
    assert largest_difference(started, weights(model, "new")) > 1e-3


def test_the_loss_is_the_task_loss_plus_lambda_times_the_penalty(tmp_path: Path) -> None:
    model = chain(penalty_weight=3.0, l2_weight=0.25)
    trainer = ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=TinyTask(model))
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    plain = model(**batch).loss
    total = trainer.compute_loss(model, batch)
    tuner = model.base_model
    expected = plain + 3.0 * tuner.orthogonality_penalty() + 0.25 * tuner.norm_penalty()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert 3.0 * tuner.orthogonality_penalty().item() > 1e-3
    model.eval()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
@pytest.mark.parametrize("penalty", ["squared", "l1"])
def test_gradient_accumulation_changes_nothing(tmp_path: Path, name: str, penalty: str) -> None:
    kind = ASOSeq2SeqTrainer if name == "t5" else ASOTrainer
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = chain(name, penalty=penalty, penalty_weight=0.5, l2_weight=0.01)
        train(
            model,
            tmp_path,
            TinyTask(model, size=32),
            kind,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.0,
        )
        results.append(weights(model, "second"))
    fresh = weights(chain(name), "second")
    assert largest_difference(fresh, results[0]) > 1e-3
    assert largest_difference(*results) < 1e-5


def test_a_killed_and_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    settings = dict(attribution=AttributionConfig(steps=2, probe_size=4, refresh=3), lora_dropout=0.1)
    options = dict(max_steps=8, save_strategy="steps", save_steps=2)
    whole = chain(tasks=("one", "two", "new"), **settings)
    train(whole, tmp_path / "whole", **options)

    killed = chain(tasks=("one", "two", "new"), **settings)
    trainer = ASOTrainer(model=killed, args=arguments(tmp_path / "cut", **options), train_dataset=TinyTask(killed))
    trainer.add_callback(Kill(after=5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()

    resumed = chain(tasks=("one", "two", "new"), **settings)
    randomize(resumed, "new", seed=99)  # whatever it held, the checkpoint counts
    train(resumed, tmp_path / "cut", resume=True, **options)
    pairs = (weights(whole, "new"), weights(resumed, "new"))
    assert largest_difference(*pairs) == 0.0
    assert whole.base_model.soft_coefficients == resumed.base_model.soft_coefficients
    assert whole.base_model.soft_coefficients != {"one": 1.0, "two": 1.0}


def test_psi_per_layer_survives_resuming(tmp_path: Path) -> None:
    settings = dict(attribution=AttributionConfig(steps=2, probe_size=4, refresh=2, granularity="layer"))
    options = dict(max_steps=3, save_strategy="steps", save_steps=2)
    model = chain(**settings)
    train(model, tmp_path, **options)
    resumed = chain(**settings)
    trainer = ASOTrainer(model=resumed, args=arguments(tmp_path, **options), train_dataset=TinyTask(resumed))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    values = resumed.base_model.soft_coefficients["first"]
    assert len(values) == 3 and values == model.base_model.soft_coefficients["first"]
    assert resumed.base_model.orthogonality_penalty().item() > 0


def test_resuming_from_another_tasks_checkpoint_is_an_error(tmp_path: Path) -> None:
    model = chain()
    train(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    model.add_adapter("third", config("llama"))
    model.set_adapter("third")
    trainer = ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=TinyTask(model))
    with pytest.raises(ValueError, match="is of task 'second'.*output_dir of its own"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_hold_the_current_task_only(tmp_path: Path) -> None:
    model = chain(tasks=("one", "two", "new"))
    train(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".part"]
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["task_name"] == "new" and saved["history"] == ["one", "two"]
    assert set(saved["soft_coefficients"]) == {"one", "two"}


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = chain(penalty_weight=0.0)
    history = weights(model, "first")
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(kwargs["model"], "second")

    trainer = ASOTrainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=6,
            learning_rate=0.5,  # so large that the last model is not the best
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        ),
        train_dataset=TinyTask(model),
        eval_dataset=TinyTask(model, seed=7),
        callbacks=[Remember()],
    )
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert best != 6
    assert largest_difference(weights(model, "second"), seen[best]) == 0.0
    assert largest_difference(weights(model, "first"), history) == 0.0


def test_coefficients_and_parts_of_the_loss_are_logged(tmp_path: Path) -> None:
    model = chain(tasks=("one", "two", "new"), penalty_weight=0.5)
    trainer = train(model, tmp_path, logging_steps=2, gradient_accumulation_steps=2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert {"psi/one", "psi/two", "similarity/one", "similarity/two"} <= set(entry)
        assert entry["psi/one"] == pytest.approx(1 - entry["similarity/one"], abs=1e-6)
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * entry["orthogonality_penalty"], rel=1e-5)


def test_the_vector_is_stored_and_saved_with_the_adapter(tmp_path: Path) -> None:
    model = chain()
    train(model, tmp_path / "run")
    vector = model.base_model.attribution["second"]
    layout = model.peft_config["second"].attribution_layout
    assert vector.shape == (layout[-1][2],) and vector.abs().sum() > 0
    model.save_pretrained(str(tmp_path / "chain"))
    fresh = chain()
    fresh.load_adapter(str(tmp_path / "chain" / "second"), adapter_name="again")
    assert torch.equal(fresh.base_model.attribution["again"], vector)


def test_lambda_zero_and_similarity_none_compute_no_coefficients(tmp_path: Path, monkeypatch) -> None:
    calls: list[str | None] = []
    import peft_aso.training.coefficients as module

    original = module.compute_attribution
    monkeypatch.setattr(module, "compute_attribution", lambda *a, **k: calls.append(k["adapter"]) or original(*a, **k))
    inc = chain(penalty_weight=0.0)
    train(inc, tmp_path)
    assert calls == ["second"]  # only the vector that is stored at the end
    calls.clear()
    hard = chain(penalty="l1", attribution=AttributionConfig(similarity="none"))
    trainer = train(hard, tmp_path)
    assert calls == [] and hard.base_model.soft_coefficients == {"first": 1.0}
    assert trainer.state.log_history[0]["orthogonality_penalty"] > 0


def test_history_is_attributed_once_a_task(tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []
    import peft_aso.training.coefficients as module

    original = module.compute_attribution
    monkeypatch.setattr(module, "compute_attribution", lambda *a, **k: calls.append(k["adapter"]) or original(*a, **k))
    model = chain(tasks=("one", "two", "new"), attribution=AttributionConfig(steps=2, probe_size=4, refresh=0.25))
    train(model, tmp_path, max_steps=4)
    assert calls.count("one") == calls.count("two") == 1
    assert calls.count("new") == 4 + 1  # steps 0, 1, 2, 3, and the stored vector


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16", "torch_compile"])
def test_training_options_give_the_plain_result(tmp_path: Path, option: str) -> None:
    settings = {"torch_compile_backend": "aot_eager"} if option == "torch_compile" else {}
    plain, other = chain(lora_dropout=0.0), chain(lora_dropout=0.0)
    train(plain, tmp_path, max_steps=3, optim="sgd")
    train(other, tmp_path, max_steps=3, optim="sgd", **{option: True}, **settings)
    moved = largest_difference(weights(chain(), "second"), weights(plain, "second"))
    tolerance = 0.1 * moved if option == "bf16" else 1e-5
    assert moved > 1e-4
    assert largest_difference(weights(plain, "second"), weights(other, "second")) < tolerance


def test_isolated_history_is_not_in_the_training_forward(tmp_path: Path) -> None:
    isolated = chain(forward_history="isolated", penalty_weight=0.0)
    train(isolated, tmp_path, max_steps=3)
    alone = get_peft_model(tiny("llama"), config("llama", penalty_weight=0.0), adapter_name="second")
    fresh = chain(forward_history="isolated", penalty_weight=0.0)
    alone.load_state_dict(fresh.state_dict(), strict=False)
    train(alone, tmp_path, max_steps=3)
    assert largest_difference(weights(isolated, "second"), weights(alone, "second")) < 1e-6


def test_bad_models_are_refused_before_training(tmp_path: Path) -> None:
    bare = tiny("llama")
    with pytest.raises(ValueError, match="get_peft_model"):
        ASOTrainer(model=bare, args=arguments(tmp_path), train_dataset=TinyTask(bare))
    model = chain()
    model.set_adapter("first")
    with pytest.raises(ValueError, match="'first' is the history of 'second' and stays frozen"):
        ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=TinyTask(model))
    frozen = chain()
    frozen.set_adapter("second", inference_mode=True)
    with pytest.raises(ValueError, match="loaded for inference"):
        ASOTrainer(model=frozen, args=arguments(tmp_path), train_dataset=TinyTask(frozen))
    apart = chain(target_modules=["o_proj"])
    with pytest.raises(HistoryError, match="no module in common"):
        ASOTrainer(model=apart, args=arguments(tmp_path), train_dataset=TinyTask(apart))
    ASOTrainer(
        model=chain(target_modules=["o_proj"], penalty_weight=0.0),
        args=arguments(tmp_path),
        train_dataset=TinyTask(bare),
    )


@pytest.mark.parametrize("penalty", ["squared", "l1"])
def test_adapters_that_are_merged_or_off_are_refused(tmp_path: Path, penalty: str) -> None:
    for leave, back, advice in (
        ("merge_adapter", "unmerge_adapter", r"merged.*model\.unmerge_adapter\(\)"),
        ("disable_adapter_layers", "enable_adapter_layers", r"switched off.*enable_adapter_layers\(\)"),
    ):
        model = chain(penalty=penalty)
        trainer = ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=TinyTask(model))
        getattr(model.base_model, leave)()
        if leave == "disable_adapter_layers":
            model.set_adapter("second")  # trains by name, and is still not in the forward pass
        before = weights(model, "second")
        with pytest.raises(ValueError, match=advice):
            ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=TinyTask(model))
        with pytest.raises(ValueError, match=advice):
            trainer.train()
        assert largest_difference(before, weights(model, "second")) == 0
        getattr(model.base_model, back)()
        trainer.train()
        assert all(value.any() for name, value in weights(model, "second").items() if "lora_B" in name)


def test_labels_all_ignored_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    model = chain(attribution=QUICK)
    data = TinyTask(model)
    data.batch["labels"][:] = -100
    trainer = ASOTrainer(model=model, args=arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="all labels are -100"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_of_another_task_is_refused(tmp_path: Path) -> None:
    """Its optimizer has the other task's weights: nothing would be learned, and nothing would say so."""
    model = chain(tasks=("first",))
    trainer = ASOTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=TinyTask(model))
    trainer.train()
    trainer.train()
    model.add_adapter("second", config("llama"))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="none of the weights of 'second'.*new trainer"):
        trainer.train()
