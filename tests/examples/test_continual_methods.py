"""What each method of the continual benchmark does, against the same thing written out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_aso import AttributionConfig, load_chain
from tests.examples.tiny_tasks import TASKS, settings_of


def tiny_method(benchmark: Any, saved: dict[str, Path], name: str, **changes: Any) -> Any:
    module = benchmark("settings")
    load = sys.modules["tasks"].load_model
    settings = module.Settings(method=name, rank=2, dropout=0.0, batch_size=5, precision="float32", **changes)
    return benchmark("methods").METHODS[name](*load(str(saved["llama"])), settings), settings


def test_ewc_is_the_brute_force_penalty(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    method, settings = tiny_method(benchmark, saved, "ewc", ewc_examples=4, ewc_weight=7.0)
    tasks = benchmark("data").read_tasks(list(TASKS), dataclasses.replace(settings, data=str(data)))
    dataset = sys.modules["tasks"].AnswerDataset
    expected = []
    for task in tasks:
        with torch.no_grad():
            for weight in method.trained().values():
                weight.add_(0.1 * torch.randn_like(weight))
        rows = dataset(task.train, method.tokenizer, False)
        squares = {name: torch.zeros_like(weight) for name, weight in method.trained().items()}
        for index in range(4):
            ids, labels = (torch.tensor([rows[index][key]]) for key in ("input_ids", "labels"))
            logs = torch.log_softmax(method.model(input_ids=ids).logits[:, :-1], -1)
            target = labels[:, 1:]
            answer = logs.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100].sum()
            method.model.zero_grad()
            answer.backward()
            for name, weight in method.trained().items():
                squares[name] += weight.grad**2 / 4
        anchors = {name: weight.detach().clone() for name, weight in method.trained().items()}
        method.end_task(task, rows)
        expected.append((squares, anchors))
    with torch.no_grad():
        for weight in method.trained().values():
            weight.add_(0.1 * torch.randn_like(weight))
    penalty = sum(
        (squares[name] * (weight - anchors[name]) ** 2).sum()
        for squares, anchors in expected
        for name, weight in method.trained().items()
    )
    assert method.training_loss({}, []).item() == pytest.approx(3.5 * penalty.item(), rel=1e-3)


def test_replay_keeps_its_part_and_no_more(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    method, settings = tiny_method(benchmark, saved, "replay", replay=0.2)
    tasks = benchmark("data").read_tasks(list(TASKS), dataclasses.replace(settings, data=str(data)))
    assert method.training_rows(tasks[0]) == tasks[0].train
    method.end_task(tasks[0], None)
    assert len(method.kept) == 2 and set(method.kept) <= set(tasks[0].train)
    assert method.training_rows(tasks[1]) == tasks[1].train + method.kept
    method.end_task(tasks[1], None)
    assert len(method.kept) == 4


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_the_teacher_of_lwf_is_the_model_before_the_task_and_stays(
    benchmark: Any, data: Path, saved: dict[str, Path], scope: str
) -> None:
    method, settings = tiny_method(benchmark, saved, "lwf", scope=scope)
    tasks = benchmark("data").read_tasks(list(TASKS), dataclasses.replace(settings, data=str(data)))
    ids, labels = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), torch.tensor([[-100, -100, 5, 6], [-100, 8, 9, -100]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    parts_of, part = benchmark("parts").parts_of, benchmark("parts").Part

    def loss_now() -> Any:
        parts = [part(p, method.model(**p), p["shift_labels"]) for p in parts_of(method.model, inputs, settings.part)]
        loss = method.training_loss(inputs, parts)
        return None if loss is None else loss.detach(), method.model(**inputs).logits.detach()

    method.start_task(tasks[0], 0)
    loss, before = loss_now()
    assert loss is None
    method.start_task(tasks[1], 1)
    assert float(loss_now()[0]) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for weight in method.trained().values():
            weight.add_(0.1 * torch.randn_like(weight))
    assert torch.equal(method.teacher(**inputs).logits, before)
    assert not any(weight.requires_grad for weight in method.teacher.parameters())
    loss, after = loss_now()
    heat, places = settings.lwf_temperature, ([0, 0, 1, 1], [1, 2, 0, 1])
    theirs, ours = (torch.softmax(each[places].double() / heat, -1) for each in (before, after))
    expected = (theirs * (theirs / ours).log()).sum(-1).mean() * heat**2
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def started(benchmark: Any, data: Path, saved: dict[str, Path], name: str = "llama", **changes: Any) -> Any:
    """ASO-LoRA about to learn the second task, the first adapter being random."""
    module = benchmark("settings")
    given = {"rank": 2, "dropout": 0.0, "precision": "float32", "probe": 2, "steps": 4, "batch_size": 5, **changes}
    settings = module.Settings(method="aso_lora", data=str(data), **given)
    load = sys.modules["tasks"].load_model
    method = benchmark("methods").METHODS["aso_lora"](*load(str(saved[name])), settings)
    first, second = benchmark("data").read_tasks(list(TASKS), settings)
    method.start_task(first, 0)
    with torch.no_grad():
        for weight in method.trained().values():
            weight.normal_()
    method.start_task(second, 1)
    return method, second, settings


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_starts_from_the_inputs(benchmark: Any, data: Path, saved: dict[str, Path], name: str) -> None:
    method, task, _ = started(benchmark, data, saved, name, init="inputs")
    (layer,) = [
        module
        for path, module in method.model.named_modules()
        if path.endswith("encoder.block.0.layer.0.SelfAttention.q" if name == "t5" else "layers.1.self_attn.q_proj")
    ]
    rows: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, 1)))
    method.model.eval()
    with torch.no_grad():
        for batch in method.few_batches(task):
            for index in range(len(batch["input_ids"])):
                length = int(batch["attention_mask"][index].sum())
                one = {key: batch[key][index : index + 1, :length] for key in ("input_ids", "attention_mask")}
                method.model(**one, **({"labels": batch["labels"][index : index + 1]} if name == "t5" else {}))
    hook.remove()
    directions = torch.linalg.svd(torch.cat(rows).double(), full_matrices=False).Vh[:2]
    found = layer.lora_A["signs"].weight.detach().double()
    torch.testing.assert_close(found @ found.T, torch.eye(2).double(), atol=1e-5, rtol=0)
    assert torch.linalg.svdvals(found @ directions.T).min() > 0.999, "the same plane"


def test_a_starts_out_of_the_historys_way(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    for init, exactly in (("inputs_hard", True), ("projected", True), ("inputs_soft", False), ("default", False)):
        method, _, _ = started(benchmark, data, saved, init=init)
        layers = benchmark("methods.directions").layers_with(method.model, "signs")
        overlaps = [layer.lora_A["signs"].weight @ layer.lora_A["colors"].weight.T for layer in layers.values()]
        assert (max(float(each.abs().max()) for each in overlaps) < 1e-4) == exactly, init


def test_a_fixed_a_stays_out_of_the_historys_way(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"init": "inputs_hard", "fixed_a": True, "similarity": "none", "no_reference": True}
    settings = settings_of(benchmark, data, saved["llama"], tmp_path, **changes)
    chain = Path(benchmark("chain").run(settings)["folder"]) / "state_02/chain"
    model = load_chain(AutoModelForCausalLM.from_pretrained(saved["llama"]), chain)
    for layer in benchmark("methods.directions").layers_with(model, "signs").values():
        new, old = layer.lora_A["signs"].weight, layer.lora_A["colors"].weight
        assert (new @ old.T).abs().max() < 1e-5 and (new @ new.T - torch.eye(len(new))).abs().max() < 1e-5
        assert layer.lora_B["signs"].weight.any()
    with pytest.raises(SystemExit, match="nothing for a penalty to push"):
        dataclasses.replace(settings, penalty_weight=(0.5,))


def test_every_setting_of_attribution_can_be_reached(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    line = (
        "--steps 7 --quadrature riemann --neurons down_proj,up_proj --stacks decoder --attribution-model task "
        "--aggregation mean --absolute --similarity cosine --granularity layer --source stored --clip --refresh 3 "
        "--probe 5"
    )
    settings = benchmark("settings").parse(line.split())
    method = benchmark("methods").METHODS["aso_lora"](*sys.modules["tasks"].load_model(str(saved["llama"])), settings)
    ours, usual = (dataclasses.asdict(each) for each in (method.config(0).attribution, AttributionConfig()))
    same = {name for name, value in ours.items() if value == usual[name]}
    assert same == {"max_rows", "max_answer_tokens"}, "these change no result"
    assert settings.alone() == benchmark("settings").Settings().alone()
    first = benchmark("first").first_folder
    (task,) = benchmark("data").read_tasks(["signs"], dataclasses.replace(settings, data=str(data)))
    assert first(settings, task) != first(dataclasses.replace(settings, neurons=("gate_proj",)), task)


def test_osf_moves_weights_along_directions_that_are_free(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    """Mostly: PEFT projects gradients, and Adam's step does not lie where the gradient lies."""
    method, settings = tiny_method(benchmark, saved, "osf", lr_full=1e-3)
    settings = dataclasses.replace(settings, data=str(data))
    tasks, learn = benchmark("data").read_tasks(list(TASKS), settings), benchmark("training").learn
    assert [method.kept(index) for index in range(3)] == pytest.approx([1 / 2, 3 / 4, 5 / 6])

    def weights() -> dict[str, torch.Tensor]:
        return {name: p.detach().double().clone() for name, p in method.model.named_parameters() if "q_proj" in name}

    for index, task in enumerate(tasks):
        before = weights()
        learn(method, task, index, settings)
        for name, after in weights().items():
            u, _, v = torch.linalg.svd(before[name])
            moved, kept = after - before[name], round(method.kept(index) * min(after.shape))
            held = [u[:, :kept].T @ moved, moved @ v[:kept].T]
            assert moved.norm() > 0 and all(each.norm() < 0.4 * moved.norm() for each in held)  # random: 0.71, 0.87


def test_a_can_stay_and_the_penaltys_gradient_is_logged(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(
        benchmark, data, saved["llama"], tmp_path, lr_a=0.0, diagnose=True, similarity="none", no_reference=True
    )
    results = benchmark("chain").run(settings)
    first, second = (stage["log"] for stage in results["stages"])
    assert all(entry["penalty_gradient"] == 0 for entry in first)
    assert all(entry["penalty_gradient"] > 0 for entry in second)
    penalties = [entry["orthogonality_penalty"] for entry in second]
    assert penalties[0] > 0 and penalties == pytest.approx([penalties[0]] * len(penalties), rel=1e-4), "psi is fixed"
