"""A from the task's own inputs, outside of the history's span: against a plain twin, and as the Trainer does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig, initialize_from_inputs, load_chain, save_chain
from peft_aso.training import inputs as module
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, arguments, chain, config, largest_difference, randomize, train, weights


def plain_twin(model: Any, rows: list[dict[str, torch.Tensor]], project: dict[str, float]) -> dict[str, np.ndarray]:
    """Layer -> its inputs outside of the history's spans, from examples without padding that run one by one."""
    tuner, seen = model.base_model, {}
    layers = tuner.lora_layers()
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))
        )
        for name, layer in layers.items()
    ]
    model.eval()
    with torch.no_grad():
        for row in rows:
            model(**row)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in layers.items():
        x = torch.cat(seen[name]).numpy()
        old = {task: layer.lora_A[task].weight.detach().double().numpy() for task in project}
        for task, part in project.items():
            if part != 1:
                x = x - part * x @ np.linalg.pinv(old[task]) @ old[task]
        wholly = [old[task] for task, part in project.items() if part == 1]
        if wholly:
            together = np.concatenate(wholly)
            x = x - x @ np.linalg.pinv(together) @ together
        found[name] = x
    return found


def cut(name: str, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The examples of a padded batch one by one, without padding."""
    rows = []
    for index in range(len(batch["input_ids"])):
        real = batch["attention_mask"][index].bool()
        row = {key: batch[key][index][real][None] for key in ("input_ids", "attention_mask")}
        labels = batch["labels"][index]
        row["labels"] = labels[labels != -100][None] if name == "t5" else labels[real][None]
        rows.append(row)
    return rows


def padded(name: str, seed: int) -> dict[str, torch.Tensor]:
    """A batch whose examples differ in length, on both sides of a T5."""
    batch = tiny_batch(tiny(name), batch_size=5, seed=seed)
    if name == "t5":  # longer ones: more directions than A has rows
        size = (5, batch["input_ids"].shape[1] - seed % 2)  # as long as the prompts, or shorter
        batch["labels"] = torch.randint(3, 64, size, generator=torch.Generator().manual_seed(seed))
    length, answer = batch["input_ids"].shape[1], batch["labels"].shape[1]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for index in range(1, 5):
        batch["attention_mask"][index, length - index :] = 0
        if name == "t5":
            batch["labels"][index, answer - min(index, answer - 1) :] = -100
        else:
            batch["labels"][index, length - index :] = -100
    return batch


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("project", [1.0, 0.0, {"one": 1.0, "two": 0.3}])
def test_the_directions_are_those_of_a_plain_decomposition(name: str, project: Any, fresh_seed: int) -> None:
    model = chain(name, tasks=("one", "two", "new"))
    for index, task in enumerate(("one", "two")):
        randomize(model, task, seed=fresh_seed % 1000 + index)
    batch = padded(name, fresh_seed % 1000)
    parts = project if isinstance(project, dict) else dict.fromkeys(("one", "two"), project)
    expected = plain_twin(model, cut(name, batch), parts)
    initialize_from_inputs(model, [batch], project=project)
    for key, layer in model.base_model.lora_layers().items():
        ours = layer.lora_A["new"].weight.detach().double()
        torch.testing.assert_close(ours @ ours.T, torch.eye(len(ours)).double(), atol=1e-6, rtol=0)
        taken_up = np.square(expected[key] @ ours.numpy().T).sum(0)  # of the inputs' energy, by each row of A
        best = np.square(np.linalg.svd(expected[key], compute_uv=False)[: len(ours)])
        np.testing.assert_allclose(taken_up, best, rtol=1e-4)
        for task, part in parts.items():
            if part == 1:
                assert (ours @ layer.lora_A[task].weight.detach().double().T).abs().max() < 1e-5


def test_layers_in_several_passes_and_batches_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, results = padded("llama", 1), []
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 5))]
    for held, batches in ((1 << 30, [batch]), (1, halves)):
        monkeypatch.setattr(module, "_HELD", held)
        model = chain()
        randomize(model, "first", seed=1)
        initialize_from_inputs(model, batches)
        results.append(weights(model, "second"))
    signs = {key: (results[0][key] * results[1][key]).sum(-1, keepdim=True).sign() for key in results[0]}
    turned = {key: value * signs[key] if "lora_A" in key else value for key, value in results[1].items()}
    assert largest_difference(results[0], turned) < 1e-4


def test_too_few_directions_are_filled_with_random_ones_outside_of_the_history() -> None:
    model = chain(r=6)
    batch = {"input_ids": torch.tensor([[3, 5]]), "labels": torch.tensor([[-100, 5]])}
    initialize_from_inputs(model, [batch])
    for layer in model.base_model.lora_layers().values():
        new, old = layer.lora_A["second"].weight, layer.lora_A["first"].weight
        torch.testing.assert_close(new @ new.T, torch.eye(6), atol=1e-5, rtol=0)
        assert (new @ old.T).abs().max() < 1e-5


def test_a_history_that_leaves_no_room_is_an_error() -> None:
    size = tiny("llama").config.hidden_size
    model = chain(r=6)
    model.delete_adapter("second")
    model.add_adapter("wide", config("llama", r=size - 6, history=[]))
    randomize(model, "wide", seed=2)
    model.add_adapter("new", config("llama", r=6))
    model.set_adapter("new")
    with pytest.raises(ValueError, match="Use smaller ranks"):
        initialize_from_inputs(model, [padded("llama", 0)])


def test_what_cannot_start_from_its_inputs_is_refused() -> None:
    batch = padded("llama", 0)
    with pytest.raises(ValueError, match="No batches"):
        initialize_from_inputs(chain(), [])
    trained = chain()
    randomize(trained, "second", seed=3)
    before = weights(trained, "second")
    with pytest.raises(ValueError, match="has been trained"):
        initialize_from_inputs(trained, [batch])
    assert largest_difference(before, weights(trained, "second")) == 0
    with pytest.raises(ValueError, match=r"embed_tokens.*project_init=True"):
        initialize_from_inputs(chain(target_modules=["embed_tokens", "q_proj"]), [batch])
    sharded = chain()
    sharded.base_model.tasks.sharded = True
    with pytest.raises(ValueError, match="before the model is wrapped"):
        initialize_from_inputs(sharded, [batch])
    with pytest.raises(ValueError, match="no ASO-LoRA adapter"):
        initialize_from_inputs(tiny("llama"), [batch])
    for project, words in ((1.5, "from 0"), ({"first": -0.1}, "from 0"), ({}, "says nothing of 'first'")):
        with pytest.raises(ValueError, match=words):
            initialize_from_inputs(chain(), [batch], project=project)


def test_the_model_is_left_as_it_was() -> None:
    model = chain(lora_dropout=0.5)
    model.train()
    old, state = weights(model, "first"), torch.get_rng_state()
    initialize_from_inputs(model, [padded("llama", 0)])
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert largest_difference(old, weights(model, "first")) == 0
    assert not any(layer._forward_pre_hooks for layer in model.base_model.lora_layers().values())


# ---- train_a=False -----------------------------------------------------------------------------------------------


def trained_names(model: Any) -> set[str]:
    return {name.split("lora_")[1][0] for name, p in model.named_parameters() if p.requires_grad}


def test_a_fixed_a_never_trains_whatever_peft_does() -> None:
    model = chain(train_a=False)
    assert trained_names(model) == {"B"}
    model.set_adapter("second")
    with model.disable_adapter():
        pass
    assert trained_names(model) == {"B"}
    model.base_model.set_requires_grad("second", True)
    assert trained_names(model) == {"B"}
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trained_names(model) == {"B"}
    model.add_adapter("third", config("llama"))
    model.set_adapter("third")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(".third." in name for name in names) and trained_names(model) == {"A", "B"}
    model.delete_adapter("third")
    model.set_adapter("second")
    assert trained_names(model) == {"B"}, "what was history trains again as it did before"


def test_a_head_trains_beside_a_fixed_a() -> None:
    model = get_peft_model(tiny("bert"), config("bert", train_a=False), adapter_name="first")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in names) and not any("lora_A" in name for name in names)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="train_a=False A does not move"):
        ASOLoraConfig(penalty_weight=0.5, train_a=False)
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        ASOLoraConfig(project_init="inputs", init_lora_weights="eva")
    with pytest.raises(ValueError, match="project_init='input' is not known"):
        ASOLoraConfig(project_init="input")  # type: ignore[arg-type]
    settings = ASOLoraConfig(project_init="inputs", train_a=False)
    assert settings.resolved_penalty_weight == 0 == ASOLoraConfig(penalty_weight=0, train_a=False).penalty_weight
    again = ASOLoraConfig(**json.loads(json.dumps(settings.to_dict(), default=list)))
    assert (again.project_init, again.train_a) == ("inputs", False)


# ---- the Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_trainer_starts_a_from_the_inputs_and_old_outputs_stand(tmp_path: Path, name: str) -> None:
    """B A x of the new task is 0 for every x in the span of the history's rows, however long B trains."""
    model = chain(name, project_init="inputs", train_a=False)
    random = weights(model, "second")
    train(model, tmp_path)
    trained = weights(model, "second")
    assert all(bool(value.any()) for key, value in trained.items() if "lora_B" in key)
    assert largest_difference({k: v for k, v in random.items() if "lora_A" in k},
                              {k: v for k, v in trained.items() if "lora_A" in k}) > 0.1  # fmt: skip
    for layer in model.base_model.lora_layers().values():
        x = layer.lora_A["first"].weight.detach()
        assert layer.lora_B["second"](layer.lora_A["second"](x)).abs().max() < 1e-5


def test_a_task_that_has_been_trained_keeps_its_a(tmp_path: Path) -> None:
    model = chain(project_init="inputs")
    data = TinyTask(model)
    train(model, tmp_path / "run", data, max_steps=2)
    first = weights(model, "second")
    train(model, tmp_path / "more", data, max_steps=1, learning_rate=0.0)
    assert largest_difference(first, weights(model, "second")) == 0

    save_chain(model, tmp_path / "chain")
    loaded = load_chain(tiny("llama"), tmp_path / "chain")
    assert largest_difference(first, weights(loaded, "second")) == 0
    assert loaded.peft_config["second"].project_init == "inputs"


def test_the_same_run_twice_and_resumed_is_the_same(tmp_path: Path) -> None:
    runs = []
    for part in ("a", "b"):
        model = chain(project_init="inputs", train_a=False, lora_dropout=0.1)
        train(model, tmp_path / part, max_steps=4, save_strategy="steps", save_steps=2)
        runs.append(weights(model, "second"))
    resumed = chain(project_init="inputs", train_a=False, lora_dropout=0.1)
    train(resumed, tmp_path / "a", max_steps=4, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(runs[0], runs[1]) == 0
    assert largest_difference(runs[0], weights(resumed, "second")) < 1e-6


@pytest.mark.parametrize("resume", [False, True])
def test_each_model_that_a_run_makes_starts_from_the_inputs(tmp_path: Path, resume: bool) -> None:
    """`model_init`, as a search over hyperparameters calls it; a resumed run takes A from its checkpoint."""
    made, rank = [], 4

    def init() -> Any:
        with torch.random.fork_rng():
            made.append(chain(project_init="inputs", penalty_weight=0.0, r=rank))
        return made[-1]

    given = init()
    data = TinyTask(given)
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    train(given, tmp_path / "given", data, **options)
    trainer = ASOTrainer(model_init=init, args=arguments(tmp_path / "made", **options), train_dataset=data)
    trainer.train()
    assert trainer.model is made[-1] and largest_difference(weights(given, "second"), weights(made[-1], "second")) == 0
    if resume:
        trainer.train(resume_from_checkpoint=str(tmp_path / "made" / "checkpoint-1"))
        assert largest_difference(weights(given, "second"), weights(made[-1], "second")) == 0
    else:
        trainer.args.learning_rate, rank = 0.0, 2
        trainer.train()
        for layer in made[-1].base_model.lora_layers().values():
            new, old = (layer.lora_A[name].weight.detach() for name in ("second", "first"))
            torch.testing.assert_close(new @ new.T, torch.eye(2), atol=1e-5, rtol=0)
            assert (new @ old.T).abs().max() < 1e-5


def test_a_model_made_for_a_run_that_cannot_train_is_refused(tmp_path: Path) -> None:
    made = []

    def init() -> Any:
        made.append(chain(attribution=AttributionConfig(similarity="none")))
        if len(made) > 1:
            made[-1].merge_adapter()
        return made[-1]

    trainer = ASOTrainer(model_init=init, args=arguments(tmp_path), train_dataset=TinyTask(chain()))
    with pytest.raises(ValueError, match="unmerge_adapter"):
        trainer.train()
