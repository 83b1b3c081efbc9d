"""Heads and embeddings of a base model whose vocabulary was resized: PEFT writes more of them than it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_aso import ASOLoraConfig, ChainError, load_chain, save_chain, update_task
from peft_aso.chain.manifest import MANIFEST_NAME
from tests.chain.chains import logits, randomize, settings
from tests.tiny_models import tiny

HEAD = "base_model.model.lm_head"
Base = Callable[[], Any]


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """Six tokens more than the base model in the folder has."""
    tiny("llama").save_pretrained(tmp_path / "base")

    def make() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(3)
        model.resize_token_embeddings(model.config.vocab_size + 6, mean_resizing=False)
        return model

    return make


def add(model: Any, task: str, *heads: str) -> Any:
    config = ASOLoraConfig(**settings("llama", modules_to_save=list(heads) or None))
    if isinstance(model, PeftModel):
        model.add_adapter(task, config)
    else:
        model = get_peft_model(model, config, adapter_name=task)
    randomize(model, task)
    model.set_adapter(task)
    return model.eval()


def hashes(folder: Path) -> dict[str, str]:
    return {each["task"]: each["sha256"] for each in json.loads((folder / MANIFEST_NAME).read_text())["tasks"]}


@pytest.mark.parametrize("heads", [("lm_head",), ("embed_tokens", "lm_head"), ()])
def test_new_tokens_and_a_head(base: Base, tmp_path: Path, heads: tuple[str, ...]) -> None:
    model = add(base(), "first", *heads)
    folder = save_chain(model, tmp_path / "chain")
    written = load_file(folder / "first" / SAFETENSORS_WEIGHTS_NAME)
    assert (f"{HEAD}.modules_to_save.weight" in written) == bool(heads), "what this test is about"
    loaded, bare = load_chain(base(), folder), base()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(bare))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(bare)), "the base model is as it was"


def test_two_heads_in_one_chain(base: Base, tmp_path: Path) -> None:
    model = add(base(), "first", "lm_head")
    before = hashes(save_chain(model, tmp_path / "chain"))
    model = add(model, "second", "lm_head")
    folder = save_chain(model, tmp_path / "chain")
    assert hashes(folder)["first"] == before["first"]
    loaded = load_chain(base(), folder)
    for task in ("second", "first"):
        model.set_adapter(task)
        loaded.set_adapter(task)
        assert torch.equal(logits(loaded), logits(model))


def test_update_of_a_head(base: Base, tmp_path: Path) -> None:
    model, newer = (add(base(), "first", "lm_head") for _ in range(2))
    randomize(newer, "first")
    save_chain(newer, tmp_path / "newer")
    assert not torch.equal(logits(model), logits(newer))
    update_task(model, "first", tmp_path / "newer")
    assert torch.equal(logits(model), logits(newer))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{HEAD}.original_module.weight", "brings its own lm_head.weight, and it differs"),
        (f"{HEAD}.modules_to_save.weight", "lm_head.modules_to_save.weight twice, with different values"),
        (f"{HEAD}.weight", "twice, with different values"),
    ],
)
def test_copies_that_differ(base: Base, tmp_path: Path, key: str, message: str) -> None:
    path = save_chain(add(base(), "first", "lm_head"), tmp_path / "chain") / "first"
    (tmp_path / "chain" / MANIFEST_NAME).unlink()
    weights = load_file(path / SAFETENSORS_WEIGHTS_NAME)
    save_file({**weights, key: weights[key] + 1}, path / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(ChainError, match=message):
        load_chain(base(), tmp_path / "chain")


def test_a_copy_alone_is_no_head(base: Base, tmp_path: Path) -> None:
    path = save_chain(add(base(), "first", "lm_head"), tmp_path / "chain") / "first" / SAFETENSORS_WEIGHTS_NAME
    (tmp_path / "chain" / MANIFEST_NAME).unlink()
    save_file({key: value for key, value in load_file(path).items() if key != f"{HEAD}.weight"}, path)
    with pytest.raises(ChainError, match="lacks lm_head.weight"):
        load_chain(base(), tmp_path / "chain")


def test_an_embedding_of_a_task_with_the_head_that_is_tied_to_it(tmp_path: Path) -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        return tiny("llama", tie_word_embeddings=True)

    config = ASOLoraConfig(**settings("llama", modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    model = get_peft_model(tied(), config, adapter_name="first").eval()
    assert torch.equal(logits(load_chain(tied(), save_chain(model, tmp_path / "new"))), logits(model))
    randomize(model, "first")
    folder = save_chain(model, tmp_path / "trained")
    assert torch.equal(logits(load_chain(tied(), folder)), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(tied(), folder / "first")), logits(model))
    file = folder / "first" / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(file)
    save_file({**weights, f"{HEAD}.weight": weights[f"{HEAD}.weight"] + 1}, file)
    with pytest.raises(ChainError, match="other values for lm_head.weight than for the module that it is tied to"):
        load_chain(tied(), folder, strict=False)
