"""The code of docs/serving.md runs, all exports compute what the chain does, servers get the folder they expect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_aso import export_lora, export_merged
from tests.chain.chains import logits, make_chain
from tests.tiny_models import tiny


@pytest.fixture
def model() -> Any:
    """A chain of three tasks of unlike ranks."""
    return make_chain(tasks={"mood": {"r": 3}, "topic": {"rank_pattern": {"q_proj": 5}}, "wish": {}})


def test_the_code_in_the_guide_runs(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    names: dict[str, Any] = {"model": model, "base": lambda: tiny("llama")}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(code, "docs/serving.md", "exec"), names)
    expected = logits(model)
    exact = AutoModelForCausalLM.from_pretrained(export_merged(model, "exact"))
    for way in (names["served"], names["loaded"], exact):
        torch.testing.assert_close(logits(way), expected, atol=1e-4, rtol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype="auto").state_dict()
    assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in exact.state_dict().items())
    assert json.loads(Path("small", "adapter_config.json").read_text())["r"] == 4


def test_the_folder_is_what_vllm_and_llama_cpp_expect(model: Any, tmp_path: Path) -> None:
    """Their documented rules: peft_type LORA, one rank with alpha equal to it, no patterns, no heads, no DoRA, and for
    each module a lora_A (rank, in) and a lora_B (out, rank) under `base_model.model.<module>`."""
    folder = export_lora(model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert config["lora_alpha"] == config["r"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_dora"] and not config["use_rslora"] and not config["modules_to_save"]
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert match is not None and tensor.dim() == 2
        rows, columns = tiny("llama").get_submodule(match[1]).weight.shape
        assert tensor.shape == ((config["r"], columns) if match[2] == "A" else (rows, config["r"]))
    served = re.search(r"--max-lora-rank (\d+)", (folder / "README.md").read_text())
    assert (
        served is not None and int(served[1]) in (8, 16, 32, 64, 128, 256, 320, 512) and int(served[1]) >= config["r"]
    )
