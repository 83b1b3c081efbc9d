"""PEFT knows ASO_LORA after `import peft_aso`, as it knows its own types."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_aso
from peft_aso import ASOLoraConfig, ASOLoraModel
from peft_aso.registration import extend_enum, register


def test_the_member_is_like_pefts_own() -> None:
    member = PeftType("ASO_LORA")
    assert member is PeftType.ASO_LORA is PeftType["ASO_LORA"]
    assert member in list(PeftType) and "ASO_LORA" in list(PeftType)
    assert isinstance(member, PeftType) and member == "ASO_LORA" and member.name == member.value == "ASO_LORA"
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member
    assert json.loads(json.dumps({"type": member})) == {"type": "ASO_LORA"}
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "ASO_LORA")
    with pytest.raises(ValueError):
        PeftType("ASO_LORA_2")


def test_registering_again_changes_nothing() -> None:
    members, mappings = list(PeftType), (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    assert register() is register() is extend_enum("ASO_LORA") is PeftType.ASO_LORA
    importlib.reload(peft_aso)
    assert list(PeftType) == members and members.count(PeftType.ASO_LORA) == 1
    assert [dict(mapping) for mapping in mappings] == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ASO_LORA] is ASOLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ASO_LORA] is ASOLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ASO_LORA] == "lora_"


def test_another_package_with_that_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.ASO_LORA, Foreign)
    with pytest.raises(RuntimeError, match="already has a method called ASO_LORA .*Foreign.*Uninstall one"):
        register()


def test_peft_finds_the_class_of_a_config(tmp_path: Path) -> None:
    config = ASOLoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["q_proj"], history=["one"])
    again = get_peft_config(config.to_dict())
    assert type(again) is ASOLoraConfig and again.r == 3 and again.history == ["one"]
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is ASOLoraConfig and loaded.target_modules == {"q_proj"}


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """The type comes with the import and not before, survives a pickle, and touches no file of PEFT's."""
    config = ASOLoraConfig(r=5, target_modules=["q_proj"])
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    code = f"""
import pickle, sys
import peft
assert "ASO_LORA" not in peft.PeftType.__members__
config = pickle.load(open({str(tmp_path / "config.pickle")!r}, "rb"))  # imports the package
import peft_aso
assert type(config) is peft_aso.ASOLoraConfig and config.peft_type is peft.PeftType.ASO_LORA and config.r == 5
config.save_pretrained({str(tmp_path)!r})
# a notebook's autoreload: all modules of the package anew
for name in [name for name in sys.modules if name.split(".")[0] == "peft_aso"]:
    del sys.modules[name]
import peft_aso as again
assert again is not peft_aso and again.ASOLoraConfig is not peft_aso.ASOLoraConfig
assert type(peft.PeftConfig.from_pretrained({str(tmp_path)!r})) is again.ASOLoraConfig
assert list(peft.PeftType).count("ASO_LORA") == 1
print("fine")
"""
    files = sorted(Path(peft.__file__).parent.rglob("*.py"))
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "fine", result.stderr
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == before
