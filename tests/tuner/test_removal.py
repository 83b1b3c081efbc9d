"""An adapter is taken out, and with it the wrappers that were made for it alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model

from peft_aso.tuner.removal import remove_adapter
from tests.tiny_models import tiny
from tests.tuner.chains import TASKS, assert_is_sum, chain, config_for, fill


def _structure(model: Any) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_taken_out_as_if_it_had_never_been_there():
    base, model = chain("llama", TASKS[:2], target_modules=["q_proj"])
    before = _structure(model)
    model.add_adapter("imdb", config_for("llama", target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"]))
    assert _structure(model) != before
    remove_adapter(model.get_base_model(), "imdb", ["amazon"])
    assert _structure(model) == before
    del model.peft_config["imdb"]
    assert_is_sum(model, base, TASKS[:2])


def test_the_active_adapters_of_the_layers_are_set():
    _, model = chain("llama")
    remove_adapter(model.get_base_model(), TASKS[-1], ["amazon", TASKS[-1]])
    assert all(layer.active_adapters == ["amazon"] for layer in model.base_model.lora_layers().values())


def test_the_only_adapter():
    base = tiny("bert")
    model = get_peft_model(tiny("bert"), config_for("bert"), adapter_name="one")
    fill(model, ["one"])
    remove_adapter(model.get_base_model(), "one", [])
    assert _structure(model.get_base_model()) == _structure(base)
    state = model.get_base_model().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


def test_an_unknown_adapter_changes_nothing():
    _, model = chain("llama")
    before = _structure(model)
    remove_adapter(model.get_base_model(), "imdb", [TASKS[-1]])
    assert _structure(model) == before
