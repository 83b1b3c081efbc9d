"""What is refused, checked alone; test_model.py and test_loading.py check the same on the way through PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_aso.tuner.checks import check_base_unchanged, check_layers, check_weights
from peft_aso.tuner.history import HistoryError, chain_obstacles, changes_base, check_adapter_name, check_chain
from tests.tiny_models import tiny
from tests.tuner.chains import TASKS, chain, config_for


@pytest.mark.parametrize("name", ["dbpedia", "task-1", "12", "Amazon_reviews", "lora", "my model", "ü"])
def test_good_names(name: str):
    for kind in ("llama", "gpt2", "t5", "bert"):
        check_adapter_name(name, tiny(kind))


def test_names_of_parameters_and_buffers_are_taken():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.ones(2))
            self.proj = nn.Linear(2, 2)

    for name in ("token", "mask", "proj", "weight"):
        with pytest.raises(ValueError, match=f"cannot be called {name!r}.*such as 'task-{name}'"):
            check_adapter_name(name, Net())


def test_the_suggestion_can_be_used():
    with pytest.raises(ValueError, match="such as 'task-default-weight'"):
        check_adapter_name("default.weight", tiny("llama"))
    check_adapter_name("task-default-weight", tiny("llama"))


def test_names_of_other_adapters_are_no_obstacle():
    _, model = chain("bert")  # its heads have the adapters' names in theirs
    check_adapter_name("imdb", model.get_base_model())


def test_plain_settings_have_no_obstacle():
    for settings in ({}, {"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}):
        assert list(chain_obstacles(config_for("llama", **settings))) == []


def test_all_obstacles_are_named():
    config = config_for("llama", use_dora=True, bias="all", init_lora_weights="olora")
    found = " | ".join(chain_obstacles(config))
    assert all(word in found for word in ("olora", "bias='all'", "use_dora"))
    assert changes_base(config) and not changes_base(config_for("llama"))


def test_a_chain_is_refused_for_any_of_its_members():
    good, dora = config_for("llama"), config_for("llama", use_dora=True)
    check_chain("two", ("one",), {"one": good, "two": good})
    check_chain("two", (), {"one": good, "two": dora})
    for configs in ({"one": dora, "two": good}, {"one": good, "two": dora}):
        with pytest.raises(HistoryError, match="cannot be part of a chain of tasks: use_dora"):
            check_chain("two", ("one",), configs)


def test_a_changed_base_is_refused_beside_others_only():
    good, olora = config_for("llama"), config_for("llama", init_lora_weights="olora")
    check_base_unchanged("one", {"one": olora})
    check_base_unchanged("two", {"one": good, "two": good})
    for configs in ({"one": olora, "two": good}, {"one": good, "two": olora}):
        with pytest.raises(HistoryError, match="'two' cannot be added: init_lora_weights='olora'"):
            check_base_unchanged("two", configs)


def test_linear_layers_can_carry_a_history():
    _, model = chain("llama")
    check_layers(model.base_model.lora_layers(), TASKS[-1], TASKS[:-1])


def _state(model: Any, task: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if f".{task}." in k}


def test_weights_that_fit():
    _, model = chain("llama")
    state = _state(model, "amazon")
    check_weights(state, model, "amazon", complete=True)
    check_weights({**state, "base_model.model.model.embed_tokens.weight": torch.ones(64, 16)}, model, "amazon")
    check_weights({**state, "something_else": torch.ones(1), "text": "no tensor"}, model, "amazon", True)
    check_weights({}, model, "amazon")


def test_weights_that_do_not_fit():
    _, model = chain("llama")
    state = _state(model, "amazon")
    first = next(iter(state))
    cases: list[tuple[dict[str, torch.Tensor], bool, str]] = [
        ({**state, first: state[first] * float("nan")}, False, "NaN or Inf"),
        ({**state, "extra": torch.tensor(float("inf"))}, False, "NaN or Inf.*extra"),
        ({**state, first: torch.ones(3, 3)}, False, r"shape \(3, 3\) in the file, has shape \(2, 16\) in it"),
        ({**state, first.replace("layers.0", "layers.9"): state[first]}, False, "layers.9.*is not in it"),
        ({k: v for k, v in state.items() if k != first}, True, "no weights for 1 of the model's parameters"),
    ]
    for changed, complete, message in cases:
        with pytest.raises(ValueError, match=message):
            check_weights(changed, model, "amazon", complete)


@pytest.mark.parametrize("name", ["sst2/v1", ".x", "a\\b", "model", "layers"])
def test_a_task_name_that_no_chain_could_have_is_refused_before_training(name: str):
    with pytest.raises(ValueError, match="A task cannot be called"):
        get_peft_model(tiny("llama"), config_for("llama", task_name=name), "sst2")
    model = get_peft_model(tiny("llama"), config_for("llama", task_name="mood"), "sst2")
    with pytest.raises(ValueError, match="A task cannot be called"):
        model.add_adapter("other", config_for("llama", task_name=name))
    assert list(model.peft_config) == ["sst2"] and model.peft_config["sst2"].task_name == "mood"
