"""PEFT knows ASO_LORA after `import peft_aso`, as it knows its own types."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import LoraConfig, PeftType, get_peft_config
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
    config = get_peft_config(ASOLoraConfig(r=3, history=["one"]).to_dict())
    assert type(config) is ASOLoraConfig and config.r == 3 and config.history == ["one"]


def test_registering_again_changes_nothing_and_another_package_of_that_name_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, mappings = list(PeftType), (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    assert register() is register() is extend_enum("ASO_LORA") is PeftType.ASO_LORA
    importlib.reload(peft_aso)
    assert list(PeftType) == members and members.count(PeftType.ASO_LORA) == 1
    assert [dict(mapping) for mapping in mappings] == before
    assert [mapping[PeftType.ASO_LORA] for mapping in mappings] == [ASOLoraConfig, ASOLoraModel]
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ASO_LORA] == "lora_"
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.ASO_LORA, LoraConfig)
    with pytest.raises(RuntimeError, match="already has a method called ASO_LORA .*LoraConfig.*Uninstall one"):
        register()


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """The type comes with the import and not before, survives a pickle, and touches no file of PEFT's."""
    pickled = pickle.dumps(ASOLoraConfig(r=5, target_modules=["q_proj"]))
    code = f"""
import pickle, sys
import peft
assert "ASO_LORA" not in peft.PeftType.__members__
config = pickle.loads({pickled!r})  # imports the package
import peft_aso
assert type(config) is peft_aso.ASOLoraConfig and config.peft_type is peft.PeftType.ASO_LORA and config.r == 5
config.save_pretrained({str(tmp_path)!r})
# a notebook's autoreload: all modules of the package anew
for name in [name for name in sys.modules if name.split(".")[0] == "peft_aso"]:
    del sys.modules[name]
import peft_aso as again
assert again is not peft_aso and again.ASOLoraConfig is not peft_aso.ASOLoraConfig
loaded = peft.PeftConfig.from_pretrained({str(tmp_path)!r})
assert type(loaded) is again.ASOLoraConfig and loaded.target_modules == {{"q_proj"}}
assert list(peft.PeftType).count("ASO_LORA") == 1
print("fine")
"""
    before = {file: file.read_bytes() for file in Path(peft.__file__).parent.rglob("*.py")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "fine", result.stderr
    assert all(file.read_bytes() == content for file, content in before.items())
