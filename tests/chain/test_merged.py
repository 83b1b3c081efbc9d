"""`export_merged`: a plain model folder that says what the chain says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from peft_aso import ChainError, export_merged, save_chain
from peft_aso.tuner.layer import adapters_in, matrices_of
from tests.chain.chains import make_chain, randomize
from tests.tiny_models import tiny_batch

CLASSES: dict[str, Any] = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForSequenceClassification,
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**tiny_batch(model)).logits


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_folder_says_what_the_chain_says(tmp_path: Path, architecture: str) -> None:
    model = make_chain(architecture)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = export_merged(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1, "in shards"
    loaded = CLASSES[architecture].from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "not touched"
    assert "first, second, third" in (folder / "README.md").read_text()


def test_some_tasks_and_another_type(tmp_path: Path) -> None:
    model = make_chain(tasks={"first": {}, "second": {"r": 3, "lora_alpha": 4}, "third": {}})
    loaded = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path, tasks=["first", "third"]))
    for name, layer in model.base_model.lora_layers().items():
        expected = layer.get_base_layer().weight.detach().double()
        for task in ("first", "third"):
            assert task in adapters_in(layer, [task])
            down, up = matrices_of(layer, task)
            expected = expected + layer.scaling[task] * up.double() @ down.double()
        torch.testing.assert_close(loaded.get_submodule(name).weight.double(), expected, atol=1e-6, rtol=1e-6)
    half = export_merged(model, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(half, dtype="auto").parameters()} == {torch.bfloat16}


def test_a_half_precision_base_is_rounded_once(tmp_path: Path) -> None:
    model = make_chain()
    model.base_model.model.to(torch.bfloat16)
    layer = next(iter(model.base_model.lora_layers().values()))
    name = next(iter(model.base_model.lora_layers()))
    exact = layer.get_base_layer().weight.detach().double()
    for task in ("first", "second", "third"):
        down, up = matrices_of(layer, task)
        exact = exact + layer.scaling[task] * up.double() @ down.double()
    for dtype in (torch.bfloat16, torch.float32):
        folder = export_merged(model, tmp_path / str(dtype), dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").get_submodule(name).weight
        torch.testing.assert_close(loaded, exact.float().to(dtype), atol=1e-6, rtol=1e-6)


def test_tied_weights_of_which_one_was_adapted_come_apart(tmp_path: Path) -> None:
    targets = {"target_modules": ["embed_tokens"]}
    for tasks, tied in (({"first": {}}, True), ({"first": targets}, False)):
        model = make_chain(tasks=tasks, tie_word_embeddings=True)
        folder = export_merged(model, tmp_path / str(tied))
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path / "chain")
    for folder, changes, message in (
        ("chain", {}, "holds a chain"),
        ("out", {"tasks": ["none"]}, "give each task once"),
        ("out", {"dtype": torch.int8}, "not a floating point"),
    ):
        with pytest.raises(ChainError, match=message):
            export_merged(model, tmp_path / folder, **changes)
    with pytest.raises(ChainError, match="needs a PeftModel"):
        export_merged(torch.nn.Linear(2, 2), tmp_path / "out")
    model.merge_adapter()
    with pytest.raises(ChainError, match=r"are merged into .* already. Call model.unmerge_adapter\(\) first.$"):
        export_merged(model, tmp_path / "out")
    model.unmerge_adapter()
    randomize(model, "second")
    with torch.no_grad():
        next(iter(model.base_model.lora_layers().values())).lora_A["second"].weight[0, 0] = float("nan")
    with pytest.raises(ChainError, match="NaN or Inf"):
        export_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
