"""A from the task's own inputs, outside of the history's span: against numpy, and as the Trainer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_aso import ASOTrainer, initialize_from_inputs
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, arguments, chain, distance, randomize, train, weights


def inputs_outside(model: Any, rows: Any, tasks: tuple[str, ...]) -> dict[Any, np.ndarray]:
    """Layer -> its inputs outside of the history's span, from examples without padding that run one by one."""
    seen: dict[Any, list[torch.Tensor]] = {layer: [] for layer in model.base_model.lora_layers().values()}
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].detach())) for layer in seen]
    for row in rows:
        model.eval()(**row)
    for hook in hooks:
        hook.remove()
    found = {}
    for layer, inputs in seen.items():
        x = torch.cat([each.flatten(0, -2) for each in inputs]).double().numpy()
        old = np.concatenate([layer.lora_A[task].weight.detach().double().numpy() for task in tasks])
        found[layer] = x - x @ np.linalg.pinv(old) @ old
    return found


def padded(name: str, seed: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A batch whose examples differ in length, on both sides of a T5; and its examples one by one, without padding."""
    batch = tiny_batch(tiny(name), batch_size=5, seed=seed)
    if name == "t5":  # as long as the prompts, or shorter
        padding = batch["attention_mask"].flip(0)[:, seed % 2 :] == 0
        batch["labels"] = torch.randint(3, 64, padding.shape).masked_fill(padding, -100)
    rows = []
    for ids, real, labels in zip(*batch.values(), strict=True):
        labels = labels[labels != -100] if name == "t5" else labels[real > 0]
        rows.append({"input_ids": ids[None, real > 0], "labels": labels[None]})
    return batch, rows


def assert_orthonormal_outside(model: Any, task: str, history: tuple[str, ...]) -> None:
    for layer in model.base_model.lora_layers().values():
        new = layer.lora_A[task].weight.detach().double()
        torch.testing.assert_close(new @ new.T, torch.eye(len(new)).double(), atol=1e-5, rtol=0)
        for old in history:
            assert (new @ layer.lora_A[old].weight.detach().double().T).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_rows_are_the_leading_directions_of_the_inputs_outside_of_the_history(name: str, fresh_seed: int) -> None:
    model = chain(name, tasks=("one", "two", "new"), lora_dropout=0.5)
    seed = fresh_seed % 1000
    batch, rows = padded(name, seed)
    expected = inputs_outside(model, rows, ("one", "two"))
    old, state = weights(model, "one"), torch.get_rng_state()
    model.train()
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 5))]
    initialize_from_inputs(model, halves if seed % 2 else [batch])
    assert_orthonormal_outside(model, "new", ("one", "two"))
    for layer, x in expected.items():
        ours = layer.lora_A["new"].weight.detach().double()
        energy = np.square(x @ ours.numpy().T).sum(0)  # of the inputs along each row of A
        best = np.square(np.linalg.svd(x, compute_uv=False)[: len(ours)])
        np.testing.assert_allclose(energy, best, rtol=1e-4)
        assert not layer._forward_pre_hooks
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert distance(old, weights(model, "one")) == 0


def test_what_cannot_start_from_its_inputs_is_refused() -> None:
    batch, _ = padded("llama", 0)
    trained = chain()
    randomize(trained, "second", seed=3)
    for model, batches, words in (
        (chain(), [], "No batches"),
        (trained, [batch], "has been trained"),
        (chain(target_modules=["embed_tokens", "q_proj"]), [batch], r"embed_tokens.*project_init=True"),
        (tiny("llama"), [batch], "no ASO-LoRA adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            initialize_from_inputs(model, batches)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_trainer_starts_a_from_the_inputs_and_old_outputs_stand(tmp_path: Path, name: str) -> None:
    """B A x of the new task is 0 for every x in the span of the history's rows, however long B trains."""
    model = chain(name, project_init="inputs", train_a=False)
    random = weights(model, "second")
    train(model, tmp_path)
    for key, value in weights(model, "second").items():
        assert (random[key] - value).abs().max() > (0.1 if "lora_A" in key else 0)
    assert_orthonormal_outside(model, "second", ("first",))
    for layer in model.base_model.lora_layers().values():
        x = layer.lora_A["first"].weight.detach()
        assert layer.lora_B["second"](layer.lora_A["second"](x)).abs().max() < 1e-5


def test_a_task_that_has_been_trained_keeps_its_a_and_resumes(tmp_path: Path) -> None:
    model = chain(project_init="inputs", lora_dropout=0.1)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(model, tmp_path, **options)
    first = weights(model, "second")
    train(model, tmp_path / "more", max_steps=1, learning_rate=0.0)
    assert distance(first, weights(model, "second")) == 0
    resumed = chain(project_init="inputs", lora_dropout=0.1)
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert distance(first, weights(resumed, "second")) == 0


@pytest.mark.parametrize("resume", [False, True])
def test_each_model_that_model_init_makes_starts_from_the_inputs(tmp_path: Path, resume: bool) -> None:
    """As a search over hyperparameters calls it; a resumed run takes A from its checkpoint."""

    def init() -> Any:
        with torch.random.fork_rng():
            return chain(project_init="inputs", penalty_weight=0.0)

    given, data = init(), TinyTask(tiny("llama"))
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    train(given, tmp_path / "given", data, **options)
    trainer = ASOTrainer(model_init=init, args=arguments(tmp_path, **options), train_dataset=data)
    for checkpoint in (None, str(tmp_path / "checkpoint-1") if resume else None):
        trainer.train(resume_from_checkpoint=checkpoint)
        assert distance(weights(given, "second"), weights(trainer.model, "second")) == 0
