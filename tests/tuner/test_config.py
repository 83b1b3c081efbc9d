"""ASOLoraConfig takes what LoraConfig takes, survives JSON, and refuses what cannot be."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftType

import peft_aso
from peft_aso import ASOLoraConfig, AttributionConfig


def test_it_has_all_fields_of_lora_with_the_same_defaults():
    ours = {field.name: field for field in dataclasses.fields(ASOLoraConfig)}
    stock = LoraConfig().to_dict()
    assert set(stock) < set(ours)
    differing = {name for name, value in stock.items() if ASOLoraConfig().to_dict()[name] != value}
    assert differing == {"peft_type"}


def test_a_full_lora_config_is_taken_over():
    settings: dict[str, Any] = {
        "r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["q_proj",
        "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "modules_to_save":
        ["score"], "layers_to_transform": [0, 1], "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM",
        "exclude_modules": ["k_proj"], "fan_in_fan_out": True,
    }  # fmt: skip
    ours, stock = ASOLoraConfig(**settings), LoraConfig(**settings)
    assert {name: getattr(ours, name) for name in settings} == {name: getattr(stock, name) for name in settings}
    assert ours.peft_type is PeftType.ASO_LORA


def test_json_round_trip(tmp_path: Path):
    config = ASOLoraConfig(
        r=4,
        target_modules=["q_proj"],
        task_name="amazon",
        history=["dbpedia"],
        forward_history="isolated",
        penalty="l1",
        penalty_weight=0.25,
        l2_weight=0.1,
        project_init=True,
        attribution=AttributionConfig(steps=7, neurons=["mlp.down_proj"], similarity="pearson", refresh=50),
        attribution_layout=[["a", 0, 4], ["b", 4, 9]],
        soft_coefficients={"dbpedia": 0.37},
        similarities={"dbpedia": 0.63},
    )
    json.dumps({k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, ASOLoraConfig) and isinstance(loaded.attribution, AttributionConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.attribution == config.attribution
    assert loaded.peft_aso_version == peft_aso.__version__
    assert config.peft_aso_version is None  # the version says "was saved": saving does not change the config
    assert copy.deepcopy(config) == config


def test_settings_of_a_newer_version_are_left_out_with_a_warning(tmp_path: Path):
    ASOLoraConfig(target_modules=["q_proj"], attribution=AttributionConfig(steps=9)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    content["attribution"]["from_the_future"] = 1
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="no settings .*from_the_future"):
        loaded: Any = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.attribution == AttributionConfig(steps=9)


def test_lambda_is_the_form_s_default_or_what_is_set():
    assert ASOLoraConfig().resolved_penalty_weight == 0.05  # validation data; the paper has 0.5
    assert ASOLoraConfig(penalty="l1").resolved_penalty_weight == 0.5
    assert ASOLoraConfig(penalty_weight=0).resolved_penalty_weight == 0
    assert ASOLoraConfig(penalty_weight=2.5, penalty="l1").resolved_penalty_weight == 2.5


@pytest.mark.parametrize("settings", [{}, {"penalty": "l1"}, {"penalty_weight": 2.5}, {"train_a": False}], ids=str)
def test_a_saved_config_has_lambda_as_a_number(settings: dict[str, Any], tmp_path: Path):
    """So that another default of a later version does not change what a task is trained on with."""
    config = ASOLoraConfig(target_modules=["q_proj"], **settings)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["penalty_weight"]
    assert saved == config.resolved_penalty_weight and isinstance(saved, float)
    assert ASOLoraConfig.from_pretrained(str(tmp_path)).resolved_penalty_weight == saved
    assert config.penalty_weight == settings.get("penalty_weight")  # saving does not change the config


def test_the_model_of_a_task_follows_the_forward_pass():
    assert ASOLoraConfig().attribution_model == "cumulative"
    assert ASOLoraConfig(forward_history="isolated").attribution_model == "task"
    own = AttributionConfig(attribution_model="task")
    assert ASOLoraConfig(attribution=own).attribution_model == "task"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"penalty_weight": -0.1}, ValueError, "penalty_weight=-0.1.*not below 0"),
        ({"penalty_weight": float("nan")}, ValueError, "penalty_weight=nan"),
        ({"penalty_weight": float("inf")}, ValueError, "penalty_weight=inf"),
        ({"penalty_weight": "0.5"}, ValueError, "penalty_weight='0.5'"),
        ({"penalty_weight": True}, ValueError, "penalty_weight=True"),
        ({"l2_weight": -1}, ValueError, "l2_weight=-1"),
        ({"penalty": "l2"}, ValueError, "penalty='l2' is not known. Choose one of: squared, l1"),
        ({"forward_history": "both"}, ValueError, "forward_history='both'.*stacked, isolated"),
        ({"history": "dbpedia"}, TypeError, "history='dbpedia': give a list"),
        ({"history": {"dbpedia"}}, TypeError, "give a list of task names, oldest first"),
        ({"history": [1]}, TypeError, "give a list of task names"),
        ({"history": ["one", "one"]}, ValueError, "names a task twice"),
        ({"task_name": ""}, TypeError, "task_name=''"),
        ({"attribution": None}, TypeError, "attribution=None: give an AttributionConfig"),
        ({"attribution": {"steps": 0}}, ValueError, "steps=0"),
        ({"r": 4, "no_such_setting": 1}, TypeError, "no_such_setting"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ASOLoraConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"probe_size": 0}, {"max_rows": 0}, {"max_rows": "8"},
        {"max_answer_tokens": 0}, {"quadrature": "simpson"}, {"stacks": "left"}, {"attribution_model": "x"},
        {"aggregation": "median"}, {"similarity": "kendall"}, {"granularity": "head"}, {"source": "old"},
        {"refresh": -0.1}, {"refresh": 1.5}, {"refresh": float("nan")}, {"refresh": "often"}, {"refresh":
        None},
    ],
)  # fmt: skip
def test_bad_attribution_settings(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AttributionConfig(**settings)


@pytest.mark.parametrize("refresh", [0, 0.1, 1, 50, 50.0])
def test_good_refresh_settings(refresh: float):
    assert AttributionConfig(refresh=refresh).refresh == refresh
