"""Adding saved adapters in bulk: which ones, and that an error leaves the model as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_aso import ASOLoraConfig
from peft_aso.chain.fitting import BaseView, check_fit
from peft_aso.chain.reading import read_adapter
from peft_aso.tuner import bulk
from peft_aso.tuner.bulk import SavedAdapter, add_saved, fits_bulk, takes_bulk
from peft_aso.tuner.checks import is_finite
from tests.chain.chains import make_chain, settings
from tests.chain.same import attributes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"use_rslora": True, "lora_bias": True, "lora_dropout": 0.1}, True),
        ({"init_lora_weights": "eva"}, True),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"rank_pattern": {"q_proj": 3}}, True),
        ({"rank_pattern": {"no_such_module": 3}}, False),
        ({"alpha_pattern": {"k_proj": 3}}, False),
        ({"modules_to_save": ["norm"]}, False),
        ({"modules_to_save": []}, True),
        ({"exclude_modules": ["v_proj"]}, False),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": None}, False),
        ({"target_modules": [f"m{index}" for index in range(20)]}, False),
        ({"task_type": "SEQ_CLS"}, False),
        ({"use_dora": True}, False),
        ({"bias": "all"}, False),
        ({"trainable_token_indices": [1]}, False),
        ({"layer_replication": [[0, 1]]}, False),
        ({"ensure_weight_tying": True}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "mica"}, False),
        ({"project_init": True}, False),
        ({"project_init": True, "peft_aso_version": "0.1.0"}, True),
    ],
)
def test_which_adapters_come_in_bulk(values: dict[str, Any], expected: bool) -> None:
    weights = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": torch.ones(2, 2) for i in (0, 1)}
    config = ASOLoraConfig(**settings("llama", **values))
    assert fits_bulk(SavedAdapter("task", config, weights)) is expected
    assert not fits_bulk(SavedAdapter("lora", config, weights))  # PEFT warns of the name


def test_which_models_take_bulk() -> None:
    model = make_chain()
    assert takes_bulk(model.base_model)
    model.merge_adapter()
    assert not takes_bulk(model.base_model)
    assert not takes_bulk(make_chain(tasks={"one": {"modules_to_save": ["norm"]}}).base_model)


# ---- errors leave the model as it was ---------------------------------------------------------------------


def _saved(folder: Path, base: nn.Module) -> list[SavedAdapter]:
    adapters = [read_adapter(folder / name) for name in ("x", "y")]
    view = BaseView.of(base)
    return [SavedAdapter(one.name, one.config, check_fit(one, one.weights(), view)) for one in adapters]


@pytest.fixture
def target(tmp_path: Path) -> tuple[Any, list[SavedAdapter]]:
    """A model with adapters of its own, and two more that are to be added, in part to other modules."""
    tasks: dict[str, dict[str, Any]] = {"x": {"target_modules": ["q_proj", "down_proj"]}, "y": {"lora_bias": True}}
    make_chain(tasks=tasks).save_pretrained(str(tmp_path / "more"))
    model = make_chain().train()
    return model, _saved(tmp_path / "more", model.base_model.model)


def _check_unchanged(model: Any, adapters: list[SavedAdapter], error: type[Exception], message: str) -> None:
    before, values = attributes(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        add_saved(model.base_model, adapters)
    assert attributes(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert gc.isenabled()


def test_adding_both(target: tuple[Any, list[SavedAdapter]]) -> None:
    model, adapters = target
    count: list[int] = []
    add_saved(model.base_model, adapters, on_added=lambda: count.append(1))
    assert list(model.peft_config) == ["first", "second", "third", "x", "y"]
    assert len(count) == 2
    assert model.active_adapters == ["third"]


@pytest.mark.parametrize("step", ["_make", "_fill", "_placed", "_check_all_layers"])
@pytest.mark.parametrize("at", [0, 1])
def test_broken_at_any_step(
    step: str, at: int, target: tuple[Any, list[SavedAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(bulk, step), []

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > (at if step != "_check_all_layers" else 0):
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(bulk, step, broken)
    _check_unchanged(*target, RuntimeError, "out of memory")


def test_histories_that_cannot_be(target: tuple[Any, list[SavedAdapter]]) -> None:
    model, (x, y) = target
    x.config.history, y.config.history = ["y"], ["x"]
    _check_unchanged(model, [x, y], ValueError, "leads back to itself")
    x.config.history, x.config.bias = ["first"], "all"
    _check_unchanged(model, [x], ValueError, "cannot be part of a chain of tasks: bias='all'")


def _without(weights: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, key: {**w, key: torch.zeros(9, 16)}, r"q_proj.lora_A.y.weight, of shape \(9, 16\).*has shape \(2,"),
        (lambda w, key: _without(w, key), "no weights for 1 of the model's parameters, such as .*lora_A.y.weight"),
        (lambda w, key: {**w, key.replace("lora_A", "lora_C"): w[key]}, "lora_C.weight.*is not in it"),
        (lambda w, key: {**w, key.replace("q_proj", "x_proj"): w[key]}, "has no module .*x_proj"),
        (lambda w, key: {**w, "aso_attribution_vector": torch.zeros(3)}, "has shape .3,., but its config describes 0"),
    ],
)
def test_weights_that_the_config_denies(
    change: Callable[..., Any], message: str, target: tuple[Any, list[SavedAdapter]]
) -> None:
    model, (x, y) = target
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    _check_unchanged(model, [x, y._replace(weights=change(dict(y.weights), key))], ValueError, message)


def test_interrupted(target: tuple[Any, list[SavedAdapter]]) -> None:
    model, adapters = target
    before = attributes(model)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_saved(model.base_model, adapters, on_added=stop)
    assert attributes(model) == before


def test_the_model_has_a_config_of_its_own(target: tuple[Any, list[SavedAdapter]]) -> None:
    model, (x, _) = target
    x.config.history = None
    add_saved(model.base_model, [x])
    assert model.peft_config["x"].history == ["first", "second", "third"]
    assert x.config.history is None


def test_a_base_model_that_another_adapter_changed(target: tuple[Any, list[SavedAdapter]]) -> None:
    _, (x, _) = target
    x.config.history = []
    _check_unchanged(make_chain(tasks={"one": {"init_lora_weights": "pissa"}}), [x], ValueError, "changes the base")


def test_layers_are_made_without_memory_and_random_numbers() -> None:
    state = torch.get_rng_state()
    held = torch.zeros(3)
    with bulk._WithoutMemory():
        layer, drawn = nn.Linear(3, 4), torch.randn(2, 2)
        nn.init.constant_(held, 1.0)
        nn.init.uniform_(tensor=held, a=1.0, b=2.0)
    assert {value.device.type for value in (layer.weight, layer.bias, drawn)} == {"meta"}
    assert torch.equal(held, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), state)


# ---- NaN and Inf ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_is_finite(dtype: torch.dtype, fresh_seed: int) -> None:
    values = torch.randn(7, 300)
    assert is_finite(values.to(dtype))
    for bad in (float("nan"), float("inf"), float("-inf"))[: 1 if dtype == torch.float8_e4m3fn else 3]:  # has no Inf
        spoilt = values.clone()
        spoilt[fresh_seed % 7, fresh_seed % 300] = bad
        assert not is_finite(spoilt.to(dtype))


def test_is_finite_where_infinities_cancel() -> None:
    assert not is_finite(torch.tensor([float("inf"), 1.0, float("-inf")]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_finite_where_the_sum_overflows(dtype: torch.dtype) -> None:
    large = torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(large.sum())
    assert is_finite(large)
    large[50, 50] = float("nan")
    assert not is_finite(large)


def test_is_finite_of_other_tensors() -> None:
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.tensor(3.0))
    assert not is_finite(torch.tensor(float("nan")))
    assert is_finite(torch.arange(5))
    assert is_finite(torch.tensor([True]))


def test_every_setting_of_peft_is_plain_or_at_its_default() -> None:
    """The names in the list are names of settings: a typing error would shut the door or leave it open."""
    names = {field.name for field in bulk.fields(LoraConfig)}
    assert names >= bulk._PLAIN_SETTINGS
