"""What PEFT's functions write and read: the attribution vector in the adapter's file; damaged files are errors."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_aso.tuner.adapter_file import check_attribution
from peft_aso.tuner.model import ATTRIBUTION_KEY
from tests.tiny_models import tiny
from tests.tuner import chains
from tests.tuner.chains import CURRENT, HISTORY, TASKS, assert_same, chain, edit_config, edit_weights, load, state_of

LAYOUT = [["model.layers.0.mlp.down_proj", 0, 3], ["model.layers.1.mlp.down_proj", 3, 5]]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A chain, each task with a vector of five neurons, and the folder that it was saved in."""
    _, model = chain("llama")
    for number, task in enumerate(TASKS):
        model.base_model.attribution[task] = torch.arange(5.0) + number
        model.peft_config[task].attribution_layout = copy.deepcopy(LAYOUT)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("order", list(itertools.permutations(TASKS)), ids="-".join)
def test_round_trip_in_any_order(saved: tuple[Any, Path], order: tuple[str, ...]):
    model, folder = saved
    loaded = load(folder, order, low_cpu_mem_usage=order[1] == "dbpedia")
    assert torch.equal(chains.logits(loaded), chains.logits(model))
    chains.assert_is_sum(loaded, tiny("llama"), TASKS)
    chains.assert_frozen(loaded, HISTORY, chains.copy_of(model, HISTORY))
    loaded.save_pretrained(folder / "again")
    for number, task in enumerate(TASKS):
        assert loaded.base_model.attribution[task].tolist() == [number + i for i in range(5)]
        assert loaded.base_model.attribution[task].dtype == torch.float32
        assert loaded.peft_config[task].attribution_layout == LAYOUT
        assert loaded.peft_config[task].history == model.peft_config[task].history
        first, second = (load_file(each / task / "adapter_model.safetensors") for each in (folder, folder / "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_file_holds_the_adapter_alone(saved: tuple[Any, Path]):
    model, folder = saved
    names = load_file(folder / "amazon" / "adapter_model.safetensors")
    assert ATTRIBUTION_KEY in names and len(names) > 2
    assert all(".lora_" in name and "amazon" not in name for name in names if name != ATTRIBUTION_KEY)
    assert not any(ATTRIBUTION_KEY in name for name in model.state_dict())
    compiled = torch.compile(model, backend="eager")
    found = get_peft_model_state_dict(compiled, adapter_name="amazon", unwrap_compiled=True)
    given = get_peft_model_state_dict(model, adapter_name="amazon", state_dict=model.state_dict())
    assert found[ATTRIBUTION_KEY].tolist() == [1, 2, 3, 4, 5] == given[ATTRIBUTION_KEY].tolist()
    with pytest.warns(UserWarning, match="is active now"):
        model.delete_adapter(CURRENT)
    assert set(model.base_model.attribution) == set(HISTORY)


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [[1]] * 5, [float("nan")] * 5, [float("inf")] * 5], ids=str)
def test_a_vector_that_does_not_fit(saved: tuple[Any, Path], values: list[Any]):
    model, folder = saved
    before = state_of(model)
    edit_weights(folder / CURRENT, lambda tensors: tensors.update({ATTRIBUTION_KEY: torch.tensor(values).float()}))
    loaded = load(folder, HISTORY)
    for each in (loaded, model):  # in the second one it is there already, and nothing changes
        with pytest.raises(ValueError, match="'agnews'"):
            each.load_adapter(folder / CURRENT, adapter_name=CURRENT)
    assert list(loaded.peft_config) == list(HISTORY) == list(loaded.base_model.attribution)
    assert_same(model, before)
    assert model.base_model.attribution[CURRENT].tolist() == [2, 3, 4, 5, 6]


def test_a_damaged_layout(saved: tuple[Any, Path]):
    ends = ([(0, 3), (4, 5)], [(1, 5)], [(0, 5), (5, 4)], [(0, 3, 9), (3, 5)])
    for layout in (None, ["a"], *([["a", *each] for each in wrong] for wrong in ends)):
        with pytest.raises(ValueError, match="adapter 'x'"):
            check_attribution("x", layout, torch.ones(5))
    edit_config(saved[1] / CURRENT, attribution_layout=[["a", 1, 5]])
    with pytest.raises(ValueError, match="adapter 'agnews'"):
        load(saved[1])


def test_reloading_weights_over_an_adapter_takes_their_vector(saved: tuple[Any, Path]):
    model, folder = saved
    _, new = chain("llama")  # a run that is resumed: the adapter does not know the neurons
    with pytest.warns(UserWarning, match="attribution vector.*'agnews'"):
        new.load_adapter(folder / CURRENT, adapter_name=CURRENT, is_trainable=True)
    assert not new.base_model.attribution and list(new.peft_config) == list(TASKS)
    edit_weights(folder / CURRENT, lambda tensors: tensors.update({ATTRIBUTION_KEY: torch.full((5,), 9).bfloat16()}))
    model.load_adapter(folder / CURRENT, adapter_name=CURRENT)
    assert model.base_model.attribution[CURRENT].tolist() == [9.0] * 5
    assert model.base_model.attribution[CURRENT].dtype == torch.float32
    edit_weights(folder / CURRENT, lambda tensors: tensors.pop(ATTRIBUTION_KEY))  # the old one is not theirs
    model.load_adapter(folder / CURRENT, adapter_name=CURRENT)
    assert CURRENT not in model.base_model.attribution


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[3]].view(-1)[0] = float("nan")


def first_of(tensors: dict[str, torch.Tensor], part: str) -> str:
    return min(name for name in tensors if part in name)


def move(tensors: dict[str, torch.Tensor]) -> None:
    name = first_of(tensors, "layers.2")
    tensors[name.replace("layers.2", "layers.7")] = tensors[name].clone()


DAMAGES: dict[str, tuple[Any, str]] = {  # of the weights, or of the config
    "NaN": (spoil, "NaN or Inf"),
    "shape": (lambda tensors: tensors.update({first_of(tensors, "lora_A"): torch.zeros(5, 7)}), r"shape \(5, 7\)"),
    "rank": ({"r": 5}, "does not fit this model"),
    "more layers": (move, "layers.7"),
    "fewer layers": (lambda tensors: tensors.pop(first_of(tensors, "layers.1")), "no weights for 1 of"),
    "dora": ({"use_dora": True}, "'amazon'.*use_dora"),
    "cycle": ({"history": ["amazon"]}, "amazon"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_an_error_and_the_model_is_as_before(damage: str, tmp_path: Path):
    change, message = DAMAGES[damage]
    _, model = chain("llama", TASKS[:2])
    model.save_pretrained(tmp_path)
    if isinstance(change, dict):
        edit_config(tmp_path / "amazon", **change)
    else:
        edit_weights(tmp_path / "amazon", change)
    loaded = load(tmp_path, TASKS[:1])
    for low in (False, True):
        loaded.set_adapter("dbpedia")
        before = state_of(loaded)
        with pytest.raises(ValueError, match=message):
            loaded.load_adapter(tmp_path / "amazon", adapter_name="amazon", low_cpu_mem_usage=low)
        loaded.set_adapter("dbpedia")
        assert_same(loaded, before)
    if damage != "dora":  # without its history it is no chain yet
        with pytest.raises(ValueError):
            load(tmp_path, ["amazon"])


def test_failed_loads_over_adapters_leave_them_there(tmp_path: Path):
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    before = state_of(model)
    for task in (CURRENT, "dbpedia"):
        edit_weights(tmp_path / task, spoil)
        with pytest.raises(ValueError, match="NaN or Inf"):
            model.load_adapter(tmp_path / task, adapter_name=task)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    with pytest.raises(ValueError, match="NaN or Inf"):  # without a file
        set_peft_model_state_dict(model, {f"{name}.weight": torch.full((2, 16), float("nan"))}, adapter_name=CURRENT)
    assert_same(model, before)
    set_peft_model_state_dict(model, {f"{name}.weight": torch.ones(2, 16)}, adapter_name=CURRENT)  # a part, as in PEFT
    assert torch.equal(model.get_parameter(f"{name}.{CURRENT}.weight"), torch.ones(2, 16))
