"""The ways to merge several tasks into one, against dense matrices and least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_aso import export_lora, export_merged
from peft_aso.tuner.low_rank import (
    MERGES,
    LowRank,
    MissingInputsError,
    merge_function,
    soft_regression_mean,
    sum_updates,
)
from tests.tiny_models import tiny
from tests.tuner.chains import TASKS, assert_close, assert_merged, chain, logits


def updates_of(ranks: Sequence[int] = (2, 3, 1), width: int = 6, out: int = 7) -> list[LowRank]:
    """Random updates in float64, with all directions of random inputs stored."""
    found = []
    for number, rank in enumerate(ranks):
        A, B = torch.randn(rank, width).double(), torch.randn(out, rank).double()
        found.append(LowRank(A, B, 0.5 + number, torch.randn(width, width).double()))
    return found


def test_running_mean_is_the_recursion(fresh_seed: int):
    updates = updates_of()
    merged, total = torch.zeros(7, 6).double(), torch.zeros(7, 6).double()
    for number, update in enumerate(updates, start=1):
        total = total + update.scale * update.B @ update.A
        merged = merged + (total - merged) / math.sqrt(number)
    assert_close(MERGES["running_mean"](updates).delta(), merged)


def test_outside_writes_into_directions_that_no_earlier_task_has(fresh_seed: int):
    updates = updates_of()
    found = MERGES["outside"](updates)
    expected, seen = torch.zeros(7, 6).double(), torch.zeros(7, 0).double()
    for update in updates:
        rest = update.B - seen @ torch.linalg.lstsq(seen, update.B).solution if seen.shape[1] else update.B
        expected, seen = expected + update.scale * rest @ update.A, torch.cat([seen, update.B], dim=1)
    assert_close(found.delta(), expected)


def test_magnitude_takes_each_weights_largest_change(fresh_seed: int):
    updates = updates_of()
    after = [sum_updates(updates[: number + 1]).delta() for number in range(3)]
    found = MERGES["magnitude"](updates).delta()
    for i in range(7):
        for j in range(6):
            largest = max((float(each[i, j]) for each in after), key=abs)
            assert found[i, j].item() == pytest.approx(largest, abs=1e-9)


def test_regmean_is_least_squares_on_each_tasks_inputs(fresh_seed: int):
    """On the inputs of task t, the model as it stood after task t is the target."""
    updates = updates_of()
    inputs, targets = [], []
    for number, update in enumerate(updates):
        assert update.inputs is not None
        x = update.inputs * (6 / update.inputs.square().sum()).sqrt()  # the trace that is stored
        inputs.append(x)
        targets.append(x @ sum_updates(updates[: number + 1]).delta().T)
    scaled = [LowRank(each.A, each.B, each.scale, x) for each, x in zip(updates, inputs, strict=True)]
    solution = torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution.T
    merged = MERGES["regmean"](scaled)
    assert merged.A.shape == (6, 6)
    errors = {
        name: (torch.cat(inputs) @ weight.T - torch.cat(targets)).norm()
        for name, weight in {"best": solution, "regmean": merged.delta(), "sum": sum_updates(updates).delta()}.items()
    }
    assert errors["best"] <= errors["regmean"] < 1.05 * errors["best"] < errors["sum"]  # it has a small ridge
    with pytest.raises(MissingInputsError, match="update_input_memory"):
        MERGES["regmean"]([LowRank(each.A, each.B) for each in updates])


def test_soft_regmean_is_between_the_sum_and_regmean(fresh_seed: int):
    """Task by task: least squares to 0 on the earlier tasks' inputs, times psi, and to the update on the others."""
    updates, psi = updates_of(), torch.rand(3, 3).double()
    inputs = []
    for update in updates:
        assert update.inputs is not None
        inputs.append(update.inputs * (6 / update.inputs.square().sum()).sqrt())
    updates = [LowRank(each.A, each.B, each.scale, x) for each, x in zip(updates, inputs, strict=True)]
    expected = torch.zeros(7, 6).double()
    for t, update in enumerate(updates):
        x = torch.cat([*(psi[t, s] * inputs[s] for s in range(t)), *inputs[t:]])
        y = torch.cat([*(torch.zeros(6, 7).double() for _ in range(t)), *(s @ update.delta().T for s in inputs[t:])])
        expected = expected + torch.linalg.lstsq(x, y).solution.T
    assert_close(soft_regression_mean(updates, psi, ridge=1e-9).delta(), expected, 1e-4)
    assert_close(soft_regression_mean(updates).delta(), MERGES["regmean"](updates).delta())
    assert_close(soft_regression_mean(updates, 0 * psi).delta(), sum_updates(updates).delta())


def test_weights_by_hand(fresh_seed: int):
    updates = updates_of()
    found = merge_function({"a": 0.5, "b": 0.0, "c": -2.0}, ["a", "b", "c"])(updates)
    assert_close(found.delta(), 0.5 * updates[0].delta() - 2 * updates[2].delta())
    for merge, words in (("mean", "none of 'sum'"), ({"a": 1.0}, "no weight for b, c")):
        with pytest.raises(ValueError, match=words):
            merge_function(merge, ["a", "b", "c"])


@pytest.mark.parametrize("merge", ["running_mean", {"dbpedia": 0.5, "amazon": 2.0, "agnews": 1.0}], ids=str)
def test_one_chain_is_merged_in_any_way(merge: str | dict[str, float], tmp_path: Path):
    """merge_and_unload, export_lora and export_merged take the way; the chain's own stays the sum."""
    base, model = chain("llama")
    expected = {name: layer.base_layer.weight.clone() for name, layer in model.base_model.lora_layers().items()}
    weights = merge if isinstance(merge, dict) else {"dbpedia": 0.17157287525381, "amazon": 0.4226497308103742}
    for name, layer in model.base_model.lora_layers().items():
        expected[name] += sum(weights.get(task, 3**-0.5) * layer.get_delta_weight(task) for task in TASKS)
    if merge == "running_mean":  # of the sums: 1, 1 + 1/sqrt(2), ...
        coefficients = [1.0, 0.0, 0.0]
        for number in (2, 3):
            reached = [1.0] * number + [0.0] * (3 - number)
            coefficients = [c + (r - c) / number**0.5 for c, r in zip(coefficients, reached, strict=True)]
        for name, layer in model.base_model.lora_layers().items():
            pairs = zip(coefficients, TASKS, strict=True)
            expected[name] = layer.base_layer.weight + sum(c * layer.get_delta_weight(task) for c, task in pairs)
    for name, weight in expected.items():
        base.get_submodule(name).weight.data = weight.detach()
    before = logits(model)
    export_lora(model, tmp_path / "adapter", merge=merge)
    stock = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert_close(logits(stock), logits(base), 1e-3)
    export_merged(model, tmp_path / "model", merge=merge)
    assert_close(logits(type(base).from_pretrained(tmp_path / "model").eval()), logits(base), 1e-3)
    assert torch.equal(logits(model), before) and model.peft_config[TASKS[-1]].merge == "sum"
    with pytest.raises(ValueError, match="no weight for"):
        model.merge_and_unload(merge={"dbpedia": 1.0})
    assert_merged(model.merge_and_unload(merge=merge), base)
