"""What each method of the continual benchmark does, against the same thing written out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tests.examples.tiny_tasks import TASKS, settings_of


@pytest.fixture
def started(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> Any:
    """A method on a fresh tiny model, and the two tasks."""

    def start(method: str, name: str = "llama", **changes: Any) -> Any:
        settings = settings_of(benchmark, data, saved[name], tmp_path, method=method, **changes)
        found = benchmark("methods").METHODS[method](*sys.modules["tasks"].load_model(str(saved[name])), settings)
        return found, benchmark("data").read_tasks(list(TASKS), settings)

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
    assert method.training_loss({}, None).item() == pytest.approx(3.5 * penalty.item(), rel=1e-3)


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_the_teacher_of_lwf_is_the_model_before_the_task(started: Any, scope: str) -> None:
    method, tasks = started("lwf", scope=scope)
    ids, labels = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), torch.tensor([[-100, -100, 5, 6], [-100, 8, 9, -100]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    method.start_task(tasks[0], 0)
    before = method.model(**inputs)
    assert method.training_loss(inputs, before) is None
    method.start_task(tasks[1], 1)
    assert float(method.training_loss(inputs, before)) == pytest.approx(0, abs=1e-6)
    move(method)
    after = method.model(**inputs)
    heat, places = method.settings.lwf_temperature, ([0, 0, 1, 1], [1, 2, 0, 1])
    theirs, ours = (torch.softmax(each.logits.detach()[places].double() / heat, -1) for each in (before, after))
    expected = (theirs * (theirs / ours).log()).sum(-1).mean() * heat**2
    assert float(method.training_loss(inputs, after)) == pytest.approx(float(expected), rel=1e-3)


def test_replay_trains_on_earlier_examples_and_osf_freezes_more_each_task(started: Any) -> None:
    replay, tasks = started("replay", replay=0.2)
    assert replay.training_rows(tasks[0]) == tasks[0].train
    replay.end_task(tasks[0], [])
    rows = replay.training_rows(tasks[1])
    assert rows[:10] == tasks[1].train and len(rows) == 12 and set(rows[10:]) <= set(tasks[0].train)
    osf, tasks = started("osf", osf_rank=0.5)
    shares = []
    for index, task in enumerate(tasks):
        osf.start_task(task, index)
        shares.append(osf.model.peft_config["default"].effective_rank)
        osf.end_task(task, [])
    assert shares == [0.5, 0.75]


def test_what_a_method_adds_is_in_the_loss_once(started: Any, tmp_path: Path) -> None:
    method, _ = started("lwf")
    method.training_loss = lambda inputs, outputs: torch.tensor(5.0)
    trainer = method.trainer(model=method.model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[]))
    trainer.method = method
    ids = torch.tensor([[3, 4, 5, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids < 5, -100)}
    alone = float(method.model.eval()(**batch).loss)
    assert float(trainer.compute_loss(method.model, dict(batch))) == pytest.approx(alone), "in training only"
    method.model.train()
    assert float(trainer.compute_loss(method.model, dict(batch))) == pytest.approx(alone + 5)
    half = float(trainer.compute_loss(method.model, dict(batch), num_items_in_batch=torch.tensor(4)))
    assert half == pytest.approx((alone + 5) / 2), "a micro-batch with two of the step's four tokens"


@pytest.mark.parametrize("kind", ["aso_lora", "lwf"])
def test_a_step_in_micro_batches_is_the_complete_step(benchmark: Any, started: Any, kind: str) -> None:
    """Ten examples with answers of unlike lengths in steps of four: the last step is of two."""

    def logs(size: int | None) -> dict[str, list[float]]:
        torch.manual_seed(0)
        method, tasks = started(kind, batch_size=4, micro_batch=size)
        method.model.double()
        found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        for index, task in enumerate(tasks):
            rows = [(prompt, answer + " good" * (at % 3)) for at, (prompt, answer) in enumerate(task.train)]
            log = benchmark("training").learn(method, dataclasses.replace(task, train=rows), index, method.settings)
            for name in found:
                found[name] += log[name]
        return found

    complete = logs(None)
    assert len(complete["loss"]) == 6
    for size in (1, 2):
        assert logs(size) == {name: pytest.approx(values, rel=1e-4) for name, values in complete.items()}
