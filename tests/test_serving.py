"""The code of docs/serving.md runs, all exports compute what the chain does, servers get the folder they expect."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_aso import ASOLoraConfig, export_lora, export_merged
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


# ---- served for real: `make test-serving` --------------------------------------------------------------------

PROMPTS = (
    "The capital of France is", "Once upon a time", "Water boils at", "My favourite food is", "The opposite of hot is",
    "A dog is", "In 1969, people", "Two plus two is", "The sun rises in the", "He said that she",
)  # fmt: skip
TOKENS = 16


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A chain of two tasks on SmolLM2-135M: a folder with `base`, `merged` and `lora`, and transformers' answers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        from tasks import load_model
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("served")
    base, tokenizer = load_model("smollm2")
    config = ASOLoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base, config, adapter_name="one").eval()
    export_merged(model, folder / "base", tokenizer=tokenizer)  # B is zero
    model.add_adapter("two", config)
    model.set_adapter("two")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.03)
    export_merged(model, folder / "merged", tokenizer=tokenizer)
    export_lora(model, folder / "lora")

    def answers(model: Any) -> list[str]:
        texts = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            tokens = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id)
            texts.append(tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts

    found = answers(model)
    with model.disable_adapter():
        assert sum(a != b for a, b in zip(found, answers(model), strict=True)) >= 5, "the adapters decide the answers"
    return folder, found


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs llama.cpp's converters and xllamacpp")
@pytest.mark.parametrize("way", ["merged", "lora"])
def test_llama_cpp_answers_as_transformers_does(exported: tuple[Path, list[str]], way: str) -> None:
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

    folder, expected = exported
    commands = [("convert_hf_to_gguf.py", "merged")]
    if way == "lora":
        commands = [("convert_hf_to_gguf.py", "base"), ("convert_lora_to_gguf.py", "--base", "base", "lora")]
    for script, *arguments in commands:
        convert = [sys.executable, str(Path(os.environ["LLAMA_CPP"], script).resolve()), *arguments]
        subprocess.run([*convert, "--outfile", f"{arguments[-1]}.gguf", "--outtype", "f32"], cwd=folder, check=True)
    settings = CommonParams()
    settings.model.path, settings.n_ctx = str(folder / f"{commands[0][1]}.gguf"), 512
    if way == "lora":
        adapter = CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(folder / "lora.gguf"), 1.0
        settings.lora_adapters = [adapter]
    server = Server(settings)
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        found = server.handle_completions({"prompt": prompt, "n_predict": TOKENS, "temperature": 0})
        assert found["choices"][0]["text"] == answer


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("way", ["merged", "lora"])
def test_vllm_answers_as_transformers_does(exported: tuple[Path, list[str]], way: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder, expected = exported
    lora = {"enable_lora": True, "max_lora_rank": 8} if way == "lora" else {}
    server = LLM(
        str(folder / ("merged" if way == "merged" else "base")), dtype="float32", max_model_len=128,
        enforce_eager=True, **lora,
    )  # fmt: skip
    request = LoRARequest("chain", 1, str(folder / "lora")) if way == "lora" else None
    outputs = server.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=TOKENS), lora_request=request)
    assert [output.outputs[0].text for output in outputs] == expected
