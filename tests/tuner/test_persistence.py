"""The attribution vector travels in the adapter's file, and is checked when it comes back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_aso.tuner.persistence import ATTRIBUTION_KEY, check_attribution, tuner_of
from tests.tiny_models import tiny
from tests.tuner.chains import TASKS, assert_is_sum, chain, copy_of

LAYOUT = [["model.layers.0.mlp.down_proj", 0, 3], ["model.layers.1.mlp.down_proj", 3, 5]]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A chain of two tasks, each with a vector of five neurons, and the folder that it was saved in."""
    _, model = chain("llama", TASKS[:2])
    for number, task in enumerate(TASKS[:2]):
        model.base_model.attribution[task] = torch.arange(5.0) + number
        model.peft_config[task].attribution_layout = copy.deepcopy(LAYOUT)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def _load(folder: Path) -> Any:
    loaded = PeftModel.from_pretrained(tiny("llama"), folder / "dbpedia", adapter_name="dbpedia")
    loaded.load_adapter(folder / "amazon", adapter_name="second")
    return loaded


def _replace_vector(folder: Path, vector: torch.Tensor | None) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(ATTRIBUTION_KEY)
    if vector is not None:
        tensors[ATTRIBUTION_KEY] = vector
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_round_trip(saved: tuple[Any, Path]):
    model, folder = saved
    loaded = _load(folder)
    assert loaded.base_model.attribution["dbpedia"].tolist() == [0, 1, 2, 3, 4]
    assert loaded.base_model.attribution["second"].tolist() == [1, 2, 3, 4, 5]
    assert loaded.peft_config["second"].attribution_layout == LAYOUT
    loaded.set_adapter("second")
    assert_is_sum(loaded.eval(), tiny("llama"), ["dbpedia", "second"])
    again = folder / "again"
    loaded.save_pretrained(again)
    tensors = load_file(again / "second" / "adapter_model.safetensors")
    assert tensors[ATTRIBUTION_KEY].tolist() == [1, 2, 3, 4, 5]
    assert not any(ATTRIBUTION_KEY in name for name in model.state_dict())


def test_the_file_is_safetensors_and_holds_the_adapter_alone(saved: tuple[Any, Path]):
    _, folder = saved
    names = load_file(folder / "amazon" / "adapter_model.safetensors")
    assert all(".lora_" in name or name == ATTRIBUTION_KEY for name in names) and len(names) > 2
    config = json.loads((folder / "amazon" / "adapter_config.json").read_text())
    assert (config["history"], config["task_name"], config["peft_type"]) == (["dbpedia"], "amazon", "ASO_LORA")


def test_state_dicts_of_wrapped_models_have_it_too(saved: tuple[Any, Path]):
    model, _ = saved
    compiled = torch.compile(model, backend="eager")
    found = get_peft_model_state_dict(compiled, adapter_name="amazon", unwrap_compiled=True)
    assert found[ATTRIBUTION_KEY].tolist() == [1, 2, 3, 4, 5]
    given = get_peft_model_state_dict(model, adapter_name="amazon", state_dict=model.state_dict())
    assert given[ATTRIBUTION_KEY].tolist() == [1, 2, 3, 4, 5]


def test_the_tuner_is_found_inside_wrappers(saved: tuple[Any, Path]):
    model, _ = saved
    tuner = model.base_model
    for wrapped in (model, tuner, torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert tuner_of(wrapped) is tuner
    assert tuner_of(nn.DataParallel(torch.compile(model, backend="eager"))) is tuner
    assert tuner_of(tiny("llama")) is None and tuner_of(nn.Linear(2, 2)) is None


def test_deleted_with_its_adapter(saved: tuple[Any, Path]):
    _, folder = saved
    loaded = _load(folder)
    loaded.delete_adapter("second")
    assert set(loaded.base_model.attribution) == {"dbpedia"}


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(4), r"shape \(4,\), but its config describes 5 neurons"),
        (torch.ones(5, 1), r"shape \(5, 1\)"),
        (torch.tensor([1, 2, float("nan"), 4, 5]), "NaN or Inf"),
        (torch.tensor([1, 2, float("inf"), 4, 5]), "NaN or Inf"),
    ],
)
def test_a_vector_that_does_not_fit(saved: tuple[Any, Path], vector: torch.Tensor, message: str):
    model, folder = saved
    values = copy_of(model, TASKS[:2])
    _replace_vector(folder / "amazon", vector)
    with pytest.raises(ValueError, match=message):
        _load(folder)
    loaded = PeftModel.from_pretrained(tiny("llama"), folder / "dbpedia", adapter_name="dbpedia")
    with pytest.raises(ValueError, match=message):
        loaded.load_adapter(folder / "amazon", adapter_name="amazon")
    assert list(loaded.peft_config) == ["dbpedia"] == list(loaded.base_model.attribution)
    with pytest.raises(ValueError, match=message):  # over one that is there already: nothing changes
        model.load_adapter(folder / "amazon", adapter_name="amazon")
    assert all(torch.equal(value, values[name]) for name, value in copy_of(model, TASKS[:2]).items())
    assert model.base_model.attribution["amazon"].tolist() == [1, 2, 3, 4, 5]


def test_a_vector_without_a_layout_is_refused(saved: tuple[Any, Path]):
    _, folder = saved
    file = folder / "amazon" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attribution_layout": None}))
    with pytest.raises(ValueError, match="its config describes 0 neurons"):
        _load(folder)


def test_reloading_weights_over_an_adapter_takes_their_vector(saved: tuple[Any, Path]):
    model, folder = saved
    _replace_vector(folder / "amazon", torch.full((5,), 9.0))
    model.load_adapter(folder / "amazon", adapter_name="amazon")
    assert model.base_model.attribution["amazon"].tolist() == [9] * 5
    _replace_vector(folder / "amazon", None)  # these weights have none: the old one is not theirs
    model.load_adapter(folder / "amazon", adapter_name="amazon")
    assert "amazon" not in model.base_model.attribution


def test_reloading_over_an_adapter_that_does_not_know_the_neurons(saved: tuple[Any, Path]):
    """A run that is resumed: the adapter is new, and only its weights are read."""
    _, folder = saved
    _, model = chain("llama", TASKS[:2])
    with pytest.warns(UserWarning, match="vector in the file is left out.*'amazon'"):
        model.load_adapter(folder / "amazon", adapter_name="amazon", is_trainable=True)
    assert not model.base_model.attribution and list(model.peft_config) == list(TASKS[:2])


@pytest.mark.parametrize(
    "layout",
    [
        [["a", 0, 3], ["b", 4, 5]],
        [["a", 1, 5]],
        [["a", 0, 3, 9], ["b", 3, 5]],
        ["a"],
        [["a", 0, 5], ["b", 5, 4]],
    ],
)
def test_a_damaged_layout(layout: Any):
    with pytest.raises(ValueError, match="attribution_layout in the config of adapter 'x' is damaged at"):
        check_attribution("x", layout, torch.ones(5))


def test_half_precision_vectors_become_float32(saved: tuple[Any, Path]):
    _, folder = saved
    _replace_vector(folder / "amazon", torch.arange(5).bfloat16())
    assert _load(folder).base_model.attribution["second"].dtype == torch.float32
