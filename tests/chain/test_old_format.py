"""A chain saved by the first version of the format loads, gives the same logits, and can be saved anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_aso import ChainError, load_chain, save_chain
from tests.chain.chains import change_weights, edit_config, logits
from tests.tiny_models import tiny

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "chain_v1", tmp_path / "chain"))


def test_same_logits_and_saved_anew(old: Path) -> None:
    expected = load_file(DATA / "chain_v1_logits.safetensors")
    for task in ("first", "second", "third"):
        model = load_chain(tiny("llama"), old, tasks=[task])
        torch.testing.assert_close(logits(model), expected[task], atol=1e-5, rtol=1e-5)
    assert model.base_model.soft_coefficients == {"first": 0.625, "second": 1.125}
    assert [vector.shape for vector in model.base_model.attribution.values()] == [(72,)] * 3
    save_chain(model, old)
    content = json.loads((old / "chain.json").read_text())
    assert content["format_version"] == 2 and not any("scale" in entry for entry in content["tasks"])
    assert torch.equal(logits(load_chain(tiny("llama"), old)), logits(model))


def test_old_hashes_and_scales_are_checked(old: Path) -> None:
    edit_config(old / "second", lora_alpha=9)
    with pytest.raises(ChainError, match="'second'.*another scale.*'lora_alpha': 9"):
        load_chain(tiny("llama"), old)
    edit_config(old / "second", lora_alpha=8)
    change_weights(old / "second")
    with pytest.raises(ChainError, match="'second'.*other weights"):
        load_chain(tiny("llama"), old)
    with pytest.warns(UserWarning, match="'second'.*other weights"):
        load_chain(tiny("llama"), old, strict=False)


def test_a_newer_format_is_refused(old: Path) -> None:
    path = old / "chain.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 3'))
    with pytest.raises(ChainError, match="format version 3.*[Uu]pgrade"):
        load_chain(tiny("llama"), old)
