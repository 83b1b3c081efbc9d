"""update_task: a version that does not fit is refused before anything is touched, one that fits brings its psi."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso import ChainError, save_chain, update_task
from peft_aso.tuner.persistence import ATTRIBUTION_KEY
from tests.chain.chains import logits, make_chain, randomize, stock_adapter
from tests.chain.same import attributes

LAYOUT = [["model.layers.0.mlp.down_proj", 0, 5]]


def with_vector(**tasks: Any) -> Any:
    """A chain whose last task has an attribution vector and psi."""
    model = make_chain(tasks=tasks or {"first": {}, "second": {}})
    last, history = model.base_model.current_task, model.base_model.history
    model.peft_config[last].attribution_layout = LAYOUT
    model.base_model.attribution[last] = torch.arange(5.0)
    model.base_model.set_soft_coefficients(dict.fromkeys(history, 0.125), similarities=dict.fromkeys(history, 0.875))
    return model


def refused(model: Any, task: str, source: Path, message: str, **options: Any) -> None:
    """A ChainError, and nothing of the model has changed."""
    before = attributes(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ChainError, match=message):
        update_task(model, task, source, **options)
    assert attributes(model) == before[0] and not model.base_model.replaced
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())


def test_not_into_merged_weights(tmp_path: Path) -> None:
    model, newer = make_chain(), make_chain(seed=1)
    base = {name: layer.base_layer.weight.clone() for name, layer in model.base_model.lora_layers().items()}
    save_chain(newer, tmp_path)
    model.merge_adapter()
    refused(model, "first", tmp_path, r"merged .*unmerge_adapter\(\) first")
    model.unmerge_adapter()
    for name, layer in model.base_model.lora_layers().items():
        torch.testing.assert_close(layer.base_layer.weight, base[name], atol=1e-6, rtol=1e-5)
    update_task(model, "first", tmp_path)
    assert torch.equal(next(iter(model.base_model.lora_layers().values())).lora_A["first"].weight,
                       next(iter(newer.base_model.lora_layers().values())).lora_A["first"].weight)  # fmt: skip


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "o_proj"], ["q_proj"]])
def test_other_modules(tmp_path: Path, targets: list[str]) -> None:
    save_chain(with_vector(first={}, second={"target_modules": targets}), tmp_path)
    refused(with_vector(), "second", tmp_path, "has other modules: the shape of .*remove_task")


def test_another_history(tmp_path: Path) -> None:
    save_chain(make_chain(tasks={"x": {}, "y": {}, "second": {}}), tmp_path / "names")
    refused(with_vector(), "second", tmp_path / "names", r"trained on top of \['x', 'y'\], and .* is \['first'\]")
    save_chain(make_chain(tasks={"second": {}}), tmp_path / "alone")
    refused(with_vector(), "second", tmp_path / "alone", r"trained on top of nothing, and .* is \['first'\]")


def test_a_history_of_other_weights(tmp_path: Path) -> None:
    newer = make_chain(tasks={"first": {}, "second": {}}, seed=1)
    save_chain(newer, tmp_path)
    sha256 = json.loads((tmp_path / "chain.json").read_text())["tasks"][0]["sha256"]
    model = with_vector()
    refused(model, "second", tmp_path, f"on top of 'first' with the sha256 {sha256}, and the model's has .*Update")
    with pytest.warns(UserWarning, match="Update 'first' first"):
        update_task(model, "second", tmp_path, strict=False)
    other = with_vector()
    update_task(other, "first", tmp_path)
    update_task(other, "second", tmp_path)
    assert torch.equal(logits(other), logits(newer))


def test_a_stock_adapter_and_a_damaged_vector(tmp_path: Path) -> None:
    stock_adapter(tmp_path / "stock" / "second")
    refused(with_vector(), "second", tmp_path / "stock", "a stock LoRA adapter")
    path = save_chain(with_vector(), tmp_path / "chain") / "second" / SAFETENSORS_WEIGHTS_NAME
    save_file({**load_file(path), ATTRIBUTION_KEY: torch.zeros(4)}, path)
    refused(with_vector(), "second", tmp_path / "chain", r"attribution vector .* shape \(4,\).* 5 neurons")


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


def test_by_the_adapters_name(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {"default": {"task_name": "mood"}, "second": {}}
    newer = make_chain(tasks=tasks, seed=1)
    save_chain(newer, tmp_path)
    model = make_chain(tasks=tasks)
    for task in ("default", "second"):
        update_task(model, task, tmp_path)
    assert torch.equal(logits(model), logits(newer))
