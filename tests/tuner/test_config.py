"""ASOLoraConfig takes what LoraConfig takes, survives JSON, and refuses what cannot be."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftType
from transformers import HfArgumentParser

import peft_aso
from peft_aso import ASOLoraConfig, AttributionConfig
from tests.tuner.chains import edit_config


def test_it_has_all_fields_of_lora_with_the_same_defaults():
    stock, ours = LoraConfig().to_dict(), ASOLoraConfig().to_dict()
    assert {name for name, value in stock.items() if ours[name] != value} == {"peft_type"}
    assert ASOLoraConfig(r=4, rank_pattern={"q_proj": 2}).rank_pattern == {"q_proj": 2}
    assert ASOLoraConfig().peft_type is PeftType.ASO_LORA


def test_every_setting_has_a_help_text_on_the_command_line():
    inherited = {each.name for each in dataclasses.fields(LoraConfig)}
    own = [each for each in dataclasses.fields(ASOLoraConfig) if each.name not in inherited]
    assert all(len(each.metadata["help"]) > 20 for each in own)
    parser: Any = HfArgumentParser(AttributionConfig)
    shown = "".join(parser.format_help().split())
    for each in dataclasses.fields(AttributionConfig):
        assert f"--{each.name}" in shown and "".join(each.metadata["help"].split())[:30] in shown, each.name
    command = ["--steps", "5", "--clip", "--similarity", "pearson", "--refresh", "0.5"]
    (found,) = parser.parse_args_into_dataclasses(command)
    assert found == AttributionConfig(steps=5, clip=True, similarity="pearson", refresh=0.5)


def test_json_round_trip(tmp_path: Path):
    config = ASOLoraConfig(
        r=4, target_modules=["q_proj"], task_name="amazon", history=["dbpedia"], forward_history="isolated",
        history_form="folded", penalty="l1", penalty_weight=0.25, l2_weight=0.1, project_init=True,
        attribution=AttributionConfig(steps=7, neurons=["mlp.down_proj"], similarity="pearson", refresh=50),
        attribution_layout=[["a", 0, 4], ["b", 4, 9]], soft_coefficients={"dbpedia": 0.37},
        similarities={"dbpedia": 0.63}, history_hashes={"dbpedia": "0" * 64},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, ASOLoraConfig) and loaded.attribution == config.attribution
    assert loaded.to_dict() == config.to_dict()
    assert loaded.peft_aso_version == peft_aso.__version__
    assert config.peft_aso_version is None, "saving does not change the config"
    assert copy.deepcopy(config) == config


def test_configs_of_earlier_and_newer_versions_load(tmp_path: Path):
    ASOLoraConfig(history=["one"], task_name="two").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    del content["merge"], content["history_hashes"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "history_form": "dense"}))
    loaded: Any = PeftConfig.from_pretrained(str(tmp_path))
    assert (loaded.history_form, loaded.merge, loaded.history_hashes) == ("auto", "sum", None)
    assert (loaded.history, loaded.task_name) == (["one"], "two")
    edit_config(tmp_path, attribution={"steps": 9, "from_the_future": 1})
    with pytest.warns(UserWarning, match="from_the_future"):
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.attribution == AttributionConfig(steps=9)


@pytest.mark.parametrize(
    ("settings", "weight"),  # the paper has 0.5; 0.05 is by validation data
    [({}, 0.05), ({"penalty": "l1"}, 0.5), ({"penalty_weight": 2.5}, 2.5), ({"train_a": False}, 0)],
)
def test_lambda_is_the_default_of_the_penalty_or_what_is_set(settings: dict[str, Any], weight: float, tmp_path: Path):
    """It is saved as a number, so that another default of a later version changes nothing for a trained task."""
    config = ASOLoraConfig(**settings)
    config.save_pretrained(tmp_path)
    saved: Any = PeftConfig.from_pretrained(str(tmp_path))
    assert config.resolved_penalty_weight == weight == saved.penalty_weight
    assert config.penalty_weight == settings.get("penalty_weight")


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_weight": -0.1}, {"penalty_weight": float("nan")}, {"penalty_weight": "0.5"},
        {"penalty_weight": 0.5, "train_a": False}, {"l2_weight": -1}, {"penalty": "l2"}, {"merge": "mean"},
        {"project_init": "pca"}, {"project_init": 1}, {"project_init": "inputs", "init_lora_weights": "orthogonal"},
        {"history_form": "unfolded"}, {"forward_history": "both"}, {"history": "dbpedia"}, {"history": {"dbpedia"}},
        {"history": ["one", "one"]}, {"task_name": ""}, {"attribution": None}, {"no_such_setting": 1},
        {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"probe_size": 0}, {"max_rows": "8"}, {"max_answer_tokens": 0},
        {"quadrature": "simpson"}, {"stacks": "left"}, {"attribution_model": "x"}, {"aggregation": "median"},
        {"similarity": "kendall"}, {"granularity": "head"}, {"source": "old"}, {"refresh": -0.1}, {"refresh": 1.5},
        {"refresh": float("nan")}, {"refresh": "often"}, {"refresh": None}, {"refresh": True},
        {"train_a": "no"}, {"train_a": 1}, {"clip": "yes"}, {"absolute": "maybe"}, {"absolute": None}, {"neurons": 3},
        {"neurons": [3]}, {"combined": 0}, {"penalty": ["squared"]}, {"penalty_weight": True}, {"l2_weight": None},
        {"history": [1]}, {"task_name": 3}, {"soft_coefficients": [1.0]}, {"history_hashes": {"one": 1}},
        {"attribution_layout": "x"}, {"origin": "hub"}, {"peft_aso_version": 1}, {"attribution": []},
    ],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any]):
    name, *_ = settings
    config = AttributionConfig if hasattr(AttributionConfig, name) else ASOLoraConfig
    with pytest.raises((ValueError, TypeError), match=name):
        config(**settings)
