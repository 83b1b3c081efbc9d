"""What PEFT's loaders read from the disk: damaged files are errors, and the model is then as it was before."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from peft_aso import HistoryError
from tests.tiny_models import tiny
from tests.tuner.chains import (
    TASKS,
    assert_is_sum,
    assert_same,
    chain,
    config_for,
    copy_of,
    logits,
    parameters_of,
    state_of,
)

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _spoil(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[3]][0, 0] = value

    return lambda folder: _edit_weights(folder, change)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = torch.zeros(5, 7)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(tensors) if "layers.2" in key)
    tensors[key.replace("layers.2", "layers.7")] = tensors[key].clone()


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in sorted(tensors) if "layers.1" in key)]


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (_spoil(float("nan")), "hold NaN or Inf.*earlier checkpoint"),
    "Inf": (_spoil(float("inf")), "hold NaN or Inf"),
    "shape": (lambda path: _edit_weights(path, _reshape), r"shape \(5, 7\) in the file.*another base model"),
    "rank": (lambda path: _edit_config(path, r=5), "does not fit this model"),
    "more layers": (lambda path: _edit_weights(path, _rename), "layers.7.*is not in it"),
    "fewer layers": (lambda path: _edit_weights(path, _drop), "no weights for 1 of the model's parameters"),
    "targets": (lambda path: _edit_config(path, target_modules=["nowhere"]), "not found in the base model"),
    "dora": (lambda path: _edit_config(path, use_dora=True), "cannot be part of a chain"),
    "cycle": (lambda path: _edit_config(path, history=["agnews"], task_name="dbpedia"), "leads back"),
}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_an_error_and_the_model_is_as_before(damage: str, low: bool, tmp_path: Path):
    spoil, message = DAMAGES[damage]
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    first, name = ("agnews", "dbpedia") if damage == "cycle" else ("dbpedia", "amazon")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / first, adapter_name=first).eval()
    loaded.base_model.tasks.alone = True  # so that it runs without its history
    folder = tmp_path / name
    spoil(folder)
    before = state_of(loaded)
    with pytest.raises(ValueError, match=message):
        loaded.load_adapter(folder, adapter_name=name, low_cpu_mem_usage=low)
    after = state_of(loaded)
    assert after[:2] == before[:2] and torch.equal(after[3], before[3])
    assert list(after[2]) == list(before[2]) and name not in loaded.base_model.attribution


def test_damaged_history_that_comes_after_its_task_is_taken_out_again(tmp_path: Path):
    _, model = chain("llama", TASKS[:2])
    model.save_pretrained(tmp_path)
    _spoil(float("nan"))(tmp_path / "dbpedia")
    with pytest.warns(UserWarning, match="trained on top of"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "amazon", adapter_name="amazon")
    with pytest.raises(ValueError, match="NaN or Inf"):
        loaded.load_adapter(tmp_path / "dbpedia", adapter_name="dbpedia")
    assert loaded.base_model.tasks.missing == {"amazon": ("dbpedia",)}
    assert not any("dbpedia" in name for name in loaded.state_dict())


def test_a_failed_load_over_an_adapter_leaves_it_there(tmp_path: Path):
    base, model = chain("llama")
    model.save_pretrained(tmp_path)
    values = copy_of(model, TASKS)
    for task in (CURRENT, "dbpedia"):
        _spoil(float("nan"))(tmp_path / task)
        with pytest.raises(ValueError, match="NaN or Inf"):
            model.load_adapter(tmp_path / task, adapter_name=task)
        assert list(model.peft_config) == list(TASKS)
    assert_is_sum(model, base, TASKS)
    assert all(torch.equal(value, values[name]) for name, value in copy_of(model, TASKS).items())


def test_weights_without_a_file_are_checked_as_well():
    _, model = chain("llama")
    state = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((2, 16), float("nan"))}
    with pytest.raises(ValueError, match="NaN or Inf"):
        set_peft_model_state_dict(model, state, adapter_name=CURRENT)
    good = {key: torch.ones_like(value) for key, value in state.items()}
    set_peft_model_state_dict(model, good, adapter_name=CURRENT)  # part of an adapter: as PEFT
    weight = model.base_model.lora_layers()["model.layers.0.self_attn.q_proj"].lora_A[CURRENT].weight
    assert torch.equal(weight, torch.ones(2, 16))


def test_an_unknown_history_in_a_new_config():
    _, model = chain("llama")
    before = state_of(model)
    with pytest.raises(HistoryError, match="no task 'imdb'.*'dbpedia', 'amazon', 'agnews'"):
        model.add_adapter("yelp", config_for("llama", history=["imdb"]))
    assert_same(model, before)


@pytest.mark.filterwarnings("ignore")
def test_pissa_can_be_converted_and_then_be_in_a_chain(tmp_path: Path):
    """The way out that the error message names."""
    base = tiny("llama")
    model = get_peft_model(tiny("llama"), config_for("llama", init_lora_weights="pissa"), adapter_name="one")
    model.save_pretrained(tmp_path)
    (tmp_path / "one").rename(tmp_path / "start")
    with torch.no_grad():
        for parameter in parameters_of(model, "one").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert list(model.peft_config) == ["one"]
    config = PeftConfig.from_pretrained(tmp_path / "converted" / "one")
    assert config.init_lora_weights is True and config.r == 4
    loaded = PeftModel.from_pretrained(base, tmp_path / "converted" / "one", adapter_name="one").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
    loaded.add_adapter("two", config_for("llama"))
    assert loaded.peft_config["two"].history == ["one"]
