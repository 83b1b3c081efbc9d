"""A from the task's own inputs, outside of the history's span: against numpy, and as the Trainer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_aso import ASOTrainer, initialize_from_inputs, load_chain, save_chain, update_input_memory
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, arguments, chain, config, distance, randomize, train, weights


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
        rows = [layer.lora_A[task].weight.detach().double().numpy() for task in tasks]
        old = np.concatenate([np.zeros((1, x.shape[1])), *rows])
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


def second_moment(stored: torch.Tensor) -> np.ndarray:
    rows = stored.double().numpy()
    return rows.T @ rows


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_task_stores_the_leading_directions_of_its_inputs(name: str, fresh_seed: int, tmp_path: Path) -> None:
    model = chain(name, tasks=("one", "two"), lora_dropout=0.5)
    randomize(model, "one", seed=1)
    randomize(model, "two", seed=2)
    batch, rows = padded(name, fresh_seed % 1000)
    layers = model.base_model.lora_layers()
    for task in ("one", "two"):
        with model.base_model.through(task):
            x = inputs_outside(model, rows, ())
        update_input_memory(model.train(), [batch], adapter=task, directions=4)
        for layer, seen in x.items():
            stored = layer.task_inputs[task]
            width = seen.shape[1]
            assert stored.shape == (4, width) and stored.dtype == torch.float16
            values, vectors = np.linalg.eigh(seen.T @ seen * width / np.square(seen).sum())
            best = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
            np.testing.assert_allclose(second_moment(stored), best, atol=2e-2)
    pairs = [(layers[key], layers[key.replace("q_proj", "v_proj")]) for key in layers if "q_proj" in key]
    assert all(q.task_inputs["two"] is v.task_inputs["two"] for q, v in pairs), "one copy for q and v"
    save_chain(model, tmp_path)
    loaded, again = load_chain(tiny(name), tmp_path), tmp_path / "again"
    save_chain(loaded, again)
    for (key, layer), other in zip(layers.items(), loaded.base_model.lora_layers().values(), strict=True):
        assert all(torch.equal(layer.task_inputs[task], other.task_inputs[task]) for task in ("one", "two")), key
    files = [next(folder.rglob("two*/adapter_model.safetensors")).read_bytes() for folder in (tmp_path, again)]
    assert files[0] == files[1]
    loaded.delete_adapter("two")
    assert all(set(layer.task_inputs) == {"one"} for layer in loaded.base_model.lora_layers().values())


def test_the_trainer_stores_input_directions_where_the_config_reads_them(tmp_path: Path) -> None:
    """And the next task starts where its inputs differ from these, with psi from the stored attribution vectors."""
    options: dict[str, Any] = {"project_init": "contrast", "train_a": False, "input_directions": 3}
    model = chain(tasks=("first",), **options)
    train(model, tmp_path)
    model.add_adapter("second", config("llama", **options))
    model.set_adapter("second")
    random = weights(model, "second")
    train(model, tmp_path)
    found = weights(model, "second")
    assert all((random[key] - found[key]).abs().max() > 1e-3 for key in found)
    assert abs(model.base_model.soft_coefficients["first"] - 1) > 0, "of stored vectors: it is 1 until then"
    assert all(layer.task_inputs["second"].shape[0] == 3 for layer in model.base_model.lora_layers().values())
    plain = chain(tasks=("first",))
    train(plain, tmp_path)
    assert not any(layer.task_inputs for layer in plain.base_model.lora_layers().values())
    plain.add_adapter("second", config("llama", penalty="inputs"))
    plain.set_adapter("second")
    with pytest.raises(ValueError, match="'first' stores none"):
        train(plain, tmp_path)


def test_soft_merging_computes_psi_without_a_penalty(tmp_path: Path) -> None:
    for merge, changes in (("soft_regmean", True), ("regmean", False)):
        model = chain(merge=merge, penalty_weight=0.0)
        train(model, tmp_path)
        assert (model.base_model.soft_coefficients["first"] != 1.0) == changes
        assert (model.peft_config["second"].similarities is not None) == changes


def test_damaged_input_directions_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = chain(tasks=("one",))
    batch, _ = padded("llama", 0)
    update_input_memory(model, [batch], directions=2)
    model.save_pretrained(str(tmp_path))
    file = next(tmp_path.rglob("adapter_model.safetensors"))
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("aso_inputs."))
    for damaged in (torch.zeros(2, 3), torch.full_like(tensors[key], float("nan")), torch.zeros(4)):
        save_file({**tensors, key: damaged}, file)
        with pytest.raises(ValueError, match="input directions|NaN or Inf"):
            load_chain(tiny("llama"), file.parent)
        with pytest.raises(ValueError, match="input directions|NaN or Inf"):
            model.load_adapter(file.parent, adapter_name="one")
        assert all(layer.task_inputs["one"].isfinite().all() for layer in model.base_model.lora_layers().values())


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
