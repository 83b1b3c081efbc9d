"""A batch in parts has the loss and the gradient of the whole batch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.examples.test_continual_methods import started
from tests.examples.tiny_tasks import TASKS, WORDS, settings_of


def random_batch(seq2seq: bool, rows: int, shared: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of 1 to 12 words after `shared` that all have, answers of 1 to 3, padded on the right."""
    count = len(WORDS) + 3
    beginning = torch.randint(3, count, (shared,))
    parts = []
    for _ in range(rows):
        prompt, answer = (torch.randint(3, count, (int(torch.randint(1, top, ())),)) for top in (13, 4))
        prompt = torch.cat([beginning, prompt])
        ids = prompt if seq2seq else torch.cat([prompt, answer])
        labels = answer if seq2seq else torch.cat([torch.full_like(prompt, -100), answer])
        parts.append((ids, torch.ones_like(ids), labels))
    names = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([part[at] for part in parts], batch_first=True, padding_value=padding)
        for at, (name, padding) in enumerate(names.items())
    }


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("shared", [0, 7, 11])
@pytest.mark.parametrize("size", [1, 3, 4, 20, None])
def test_parts_have_the_loss_and_gradient_of_the_whole(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, name: str, size: int | None, shared: int
) -> None:
    method, _, _ = started(benchmark, data, saved, name)
    training = sys.modules["transformers"].TrainingArguments(output_dir=str(tmp_path), report_to=[])
    batch = random_batch(name == "t5", 7, shared)
    targets = batch["labels"] if name == "t5" else batch["labels"][:, 1:]
    count = (targets != -100).sum()
    method.model.double().train()
    trained = list(method.trained().values())
    found = []
    for kind in (Trainer, benchmark("methods.base").LossTrainer):
        trainer = kind(model=method.model, args=training)
        trainer.method, trainer.part_size = method, size
        loss, outputs = trainer.compute_loss(method.model, dict(batch), return_outputs=True, num_items_in_batch=count)
        found.append((loss, torch.autograd.grad(loss, trained, allow_unused=True)))
    assert len(outputs) == (1 if name == "t5" or size == 20 else 2 if size in (4, None) else -(-7 // size))
    if name == "llama":  # shared are all words but one of a prompt, if they are worth it
        cached = [part for part in outputs if "past_key_values" in part.inputs]
        assert bool(cached) == (shared > 7)
    assert sum(len(part.answers(part.outputs.logits)) for part in outputs) == count
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-4)  # norms are float32


def test_the_penalty_is_there_once(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    method, _, _ = started(benchmark, data, saved, similarity="none", penalty_weight=(0.3,))
    training = sys.modules["transformers"].TrainingArguments(output_dir=str(tmp_path), report_to=[])
    batch = random_batch(False, 7)
    trainer = method.trainer(model=method.model, args=training)
    trainer.current_gradient_accumulation_steps = 1  # as within a training step
    method.model.train()
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(method.model, dict(batch), num_items_in_batch=count)
    plain = method.model(**batch).loss
    tuner = method.model.base_model
    assert loss.item() == pytest.approx((plain + 0.3 * tuner.orthogonality_penalty()).item(), rel=1e-5)


def test_a_model_that_cannot_leave_out_logits_is_run_whole(benchmark: Any) -> None:
    from tests.tiny_models import tiny

    takes_parts = benchmark("parts").takes_parts
    assert takes_parts(tiny("llama")) and not takes_parts(tiny("t5")) and not takes_parts(tiny("bert"))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["aso_lora", "ewc", "lwf", "seq_ft"])
def test_a_step_in_micro_batches_is_the_whole_step(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    """Ten examples with answers of unlike lengths in steps of four: the last step is of two."""

    def logs(size: int | None) -> list[dict[str, float]]:
        settings = settings_of(
            benchmark, data, saved[name], tmp_path, method=kind, batch_size=4, micro_batch=size, lr_full=1e-3
        )
        base, tokenizer = sys.modules["tasks"].load_model(str(saved[name]))
        for module in base.modules():  # T5 drops out by itself, and draws anew for each micro-batch
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
            elif isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        method = benchmark("methods").METHODS[kind](base.double(), tokenizer, settings)
        found = []
        for index, task in enumerate(benchmark("data").read_tasks(list(TASKS), settings)):
            rows = [(prompt, answer + " good" * (at % 3)) for at, (prompt, answer) in enumerate(task.train)]
            found += benchmark("training").learn(method, dataclasses.replace(task, train=rows), index, settings)
        return [{key: log[key] for key in ("loss", "grad_norm", "task_loss") if key in log} for log in found]

    whole = logs(None)
    assert len(whole) == 6 and (kind == "seq_ft" or len(whole[-1]) == 3)
    if kind in ("ewc", "lwf"):
        assert whole[-1]["loss"] > whole[-1]["task_loss"]
    for size in (1, 2):
        assert logs(size) == [pytest.approx(log, rel=1e-4) for log in whole]
