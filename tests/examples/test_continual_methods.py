"""What each method of the continual benchmark does, against the same thing written out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.examples.tiny_tasks import TASKS, settings_of
from tests.tiny_models import tiny_batch


@pytest.fixture
def started(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> Any:
    """A method on a fresh tiny model, and the two tasks; with `second` it is about to learn the second one."""

    def start(method: str, name: str = "llama", second: bool = False, **changes: Any) -> Any:
        settings = settings_of(benchmark, data, saved[name], tmp_path, method=method, **changes)
        found = benchmark("methods").METHODS[method](*sys.modules["tasks"].load_model(str(saved[name])), settings)
        tasks = benchmark("data").read_tasks(list(TASKS), settings)
        if second:
            found.start_task(tasks[0], 0)
            move(found, 1.0)
            found.start_task(tasks[1], 1)
        return found, tasks

    return start


@torch.no_grad()
def move(method: Any, by: float = 0.1) -> None:
    for weight in method.trained().values():
        weight.add_(by * torch.randn_like(weight))


def test_ewc_is_the_brute_force_penalty(started: Any) -> None:
    method, tasks = started("ewc", ewc_examples=4, ewc_weight=7.0)
    expected = []
    for task in tasks:
        move(method)
        rows = sys.modules["tasks"].AnswerDataset(task.train, method.tokenizer, False)
        squares = {name: torch.zeros_like(weight) for name, weight in method.trained().items()}
        for index in range(4):
            ids, labels = (torch.tensor([rows[index][key]]) for key in ("input_ids", "labels"))
            logs = torch.log_softmax(method.model(input_ids=ids).logits[:, :-1], -1)
            target = labels[:, 1:]
            method.model.zero_grad()
            logs.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100].sum().backward()
            for name, weight in method.trained().items():
                squares[name] += weight.grad**2 / 4
        anchors = {name: weight.detach().clone() for name, weight in method.trained().items()}
        method.end_task(task, rows)
        expected.append((squares, anchors))
    move(method)
    weights = method.trained().items()
    penalty = sum((s[name] * (w - a[name]) ** 2).sum() for s, a in expected for name, w in weights)
    assert method.training_loss({}, []).item() == pytest.approx(3.5 * penalty.item(), rel=1e-3)


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_the_teacher_of_lwf_is_the_model_before_the_task(benchmark: Any, started: Any, scope: str) -> None:
    method, tasks = started("lwf", scope=scope)
    ids, labels = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), torch.tensor([[-100, -100, 5, 6], [-100, 8, 9, -100]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    parts_of, part = benchmark("parts").parts_of, benchmark("parts").Part

    def loss_now() -> Any:
        model = method.model
        parts = [part(p, model(**p), p["shift_labels"]) for p in parts_of(model, inputs, method.settings.part)]
        return method.training_loss(inputs, parts), model(**inputs).logits.detach()

    method.start_task(tasks[0], 0)
    loss, before = loss_now()
    assert loss is None
    method.start_task(tasks[1], 1)
    assert float(loss_now()[0]) == pytest.approx(0, abs=1e-6)
    move(method)
    assert torch.equal(method.teacher(**inputs).logits, before)
    loss, after = loss_now()
    heat, places = method.settings.lwf_temperature, ([0, 0, 1, 1], [1, 2, 0, 1])
    theirs, ours = (torch.softmax(each[places].double() / heat, -1) for each in (before, after))
    expected = (theirs * (theirs / ours).log()).sum(-1).mean() * heat**2
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def random_batch(model: Any, shared: int = 0) -> dict[str, torch.Tensor]:
    """Seven prompts of 1 to 12 tokens after `shared` that all have, with answers."""
    batch = tiny_batch(model, 7, prompt=(1, 12))
    same = torch.randint(3, 64, (shared,)).expand(7, -1)
    before = {"input_ids": same, "attention_mask": torch.ones_like(same)}
    if not model.config.is_encoder_decoder:
        before["labels"] = torch.full_like(same, -100)
    return batch | {name: torch.cat([beginning, batch[name]], 1) for name, beginning in before.items()}


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("size", [1, 3, None])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_batch(
    benchmark: Any, started: Any, tmp_path: Path, name: str, size: int | None, shared: int
) -> None:
    method, _ = started("aso_lora", name, second=True)
    batch = random_batch(method.model, shared)
    targets = batch["labels"] if name == "t5" else batch["labels"][:, 1:]
    method.model.double().train()
    trained = list(method.trained().values())
    found = []
    for kind in (Trainer, benchmark("methods.base").LossTrainer):
        trainer = kind(model=method.model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[]))
        trainer.method, trainer.part_size = method, size
        loss = trainer.compute_loss(method.model, dict(batch), num_items_in_batch=(targets != -100).sum())
        found.append((loss, torch.autograd.grad(loss, trained, allow_unused=True)))
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-4)  # norms are float32


def test_the_penalty_is_there_once(started: Any, tmp_path: Path) -> None:
    method, _ = started("aso_lora", second=True, similarity="none", penalty_weight=(0.3,))
    batch = random_batch(method.model)
    trainer = method.trainer(model=method.model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[]))
    trainer.current_gradient_accumulation_steps = 1  # as within a training step
    method.model.train()
    loss = trainer.compute_loss(method.model, dict(batch), num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
    alone, penalty = method.model(**batch).loss, method.model.base_model.orthogonality_penalty()
    assert loss.item() == pytest.approx((alone + 0.3 * penalty).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["aso_lora", "lwf"])
def test_a_step_in_micro_batches_is_the_complete_step(benchmark: Any, started: Any, name: str, kind: str) -> None:
    """Ten examples with answers of unlike lengths in steps of four: the last step is of two."""

    def logs(size: int | None) -> list[Any]:
        torch.manual_seed(0)
        method, tasks = started(kind, name, batch_size=4, micro_batch=size)
        method.model.double()
        found = []
        for index, task in enumerate(tasks):
            rows = [(prompt, answer + " good" * (at % 3)) for at, (prompt, answer) in enumerate(task.train)]
            task = dataclasses.replace(task, train=rows)
            found += benchmark("training").learn(method, task, index, method.settings)
        return [{key: log[key] for key in ("loss", "grad_norm", "task_loss") if key in log} for log in found]

    complete = logs(None)
    assert len(complete) == 6 and len(complete[-1]) == 3
    for size in (1, 2):
        assert logs(size) == [pytest.approx(log, rel=1e-4) for log in complete]
