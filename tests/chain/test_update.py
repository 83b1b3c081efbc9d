"""remove_task and update_task: the model is the sum of what is left, and a version that does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_aso import ChainError, remove_task, save_chain, update_task
from peft_aso.tuner.model import ATTRIBUTION_KEY
from tests.chain.chains import edit, load, logits, make_chain, randomize, same_logits, stock_adapter, unchanged
from tests.tiny_models import tiny


def test_without_a_task_the_model_is_the_sum_of_the_others(tmp_path: Path) -> None:
    model = make_chain()
    model.peft_config["third"].similarities = {"first": 0.5, "second": 0.25}
    before = logits(model)
    remove_task(model, "second")
    config = model.peft_config["third"]
    assert model.base_model.history == ("first",) and config.similarities == {"first": 0.5}
    assert config.history == ["first"] == list(config.history_hashes)
    expected = tiny("llama")
    with torch.no_grad():
        for name, layer in model.base_model.lora_layers().items():
            for task in ("first", "third"):
                delta = layer.lora_B[task].weight @ layer.lora_A[task].weight
                expected.get_submodule(name).weight += layer.scaling[task] * delta
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, logits(model))
    same_logits(load(save_chain(model, tmp_path)), model)


def test_the_active_task_can_go_and_the_last_one_cannot() -> None:
    model = make_chain()
    with pytest.warns(UserWarning, match="'second' is active now"):
        remove_task(model, "third")
    assert model.base_model.current_task == "second"
    remove_task(model, "first")
    for task, message in (("second", "only task"), ("first", "no task 'first'")):
        with pytest.raises(ChainError, match=message):
            remove_task(model, task)
    with pytest.raises(ChainError, match="needs a PeftModel"):
        remove_task(tiny("llama"), "first")


def with_vector(**tasks: Any) -> Any:
    """A chain whose last task has an attribution vector and psi."""
    model = make_chain(tasks=tasks or {"first": {}, "second": {}})
    last, history = model.base_model.current_task, model.base_model.history
    model.peft_config[last].attribution_layout = [["model.layers.0.mlp.down_proj", 0, 5]]
    model.base_model.attribution[last] = torch.arange(5.0)
    model.base_model.set_soft_coefficients(dict.fromkeys(history, 0.125), similarities=dict.fromkeys(history, 0.875))
    return model


def refused(model: Any, task: str, source: Path, message: str) -> None:
    """A ChainError, and nothing of the model has changed."""
    with unchanged(model), pytest.raises(ChainError, match=message):
        update_task(model, task, source)


def test_versions_that_do_not_fit_and_merged_weights(tmp_path: Path) -> None:
    model = with_vector()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("first", {"first": {"r": 3}}, "r 3, not 2"),
        ("second", {"first": {}, "second": {"target_modules": ["q_proj", "o_proj"]}}, "o_proj.* None here"),
        ("second", {"first": {}, "second": {"target_modules": ["q_proj"]}}, "v_proj.* None in the file"),
        ("second", {"x": {}, "y": {}, "second": {}}, r"trained on top of \['x', 'y'\], .* \['first'\]"),
        ("second", {"second": {}}, r"trained on top of nothing, .* \['first'\]"),
        ("second", {"first": {}}, "no task 'second' here"),
    ]
    for number, (task, tasks, message) in enumerate(cases):
        refused(model, task, save_chain(with_vector(**tasks), tmp_path / str(number)), message)
    refused(model, "third", tmp_path / "0", "no task 'third' in the model")
    stock_adapter(tmp_path / "stock" / "second")
    refused(model, "second", tmp_path / "stock", "a stock LoRA adapter")
    save_chain(with_vector(), tmp_path / "vector")
    edit(tmp_path / "vector" / "second", lambda weights: weights.update({ATTRIBUTION_KEY: torch.zeros(4)}))
    refused(model, "second", tmp_path / "vector", r"attribution vector .* shape \(4,\).* 5 neurons")
    model.merge_adapter()
    refused(model, "first", tmp_path / "vector", r"merged .*unmerge_adapter\(\) first")
    with pytest.raises(ChainError, match=r"unmerge_adapter\(\) first"):
        remove_task(model, "first")


def test_a_history_of_other_weights(tmp_path: Path) -> None:
    newer = make_chain(tasks={"first": {}, "second": {}}, seed=1)
    save_chain(newer, tmp_path)
    digest = newer.base_model.adapter_hash("first")
    message = f"'second' was trained on top of 'first' with the sha256 {digest}.*Load"
    refused(with_vector(), "second", tmp_path, message)
    with pytest.warns(UserWarning, match="trained on top of 'first'"):
        update_task(with_vector(), "second", tmp_path, strict=False)
    other = make_chain()
    update_task(other, "first", tmp_path)
    assert [other.peft_config[task].history_hashes["first"] for task in ("second", "third")] == [digest] * 2
    update_task(other, "second", tmp_path)
    load(save_chain(other, tmp_path / "new"))
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(newer))


def test_psi_and_vector_are_the_new_ones(tmp_path: Path) -> None:
    newer = with_vector()
    randomize(newer, "second")
    newer.base_model.set_soft_coefficients({"first": 0.5}, similarities={"first": 0.5})
    newer.base_model.attribution["second"] = torch.full((5,), 2.0)
    save_chain(newer, tmp_path)
    model = with_vector()
    assert model.base_model.soft_coefficients == {"first": 0.125}
    update_task(model, "second", tmp_path)
    assert model.base_model.soft_coefficients == {"first": 0.5} == model.peft_config["second"].soft_coefficients
    assert model.peft_config["second"].similarities == {"first": 0.5}
    assert torch.equal(model.base_model.attribution["second"], torch.full((5,), 2.0))
    assert torch.equal(logits(model), logits(newer))
