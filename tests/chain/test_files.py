"""Adapter folders that are unsafe, damaged or no adapters are refused before the model is touched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from peft_aso import ChainError, load_chain, save_chain
from tests.chain.chains import edit_config, edit_weights, make_chain
from tests.tiny_models import tiny


def check_refused(source: Any, message: str, base: Any = None) -> None:
    """The error is raised and the base model has not changed at all."""
    base = tiny("llama") if base is None else base
    names = [(name, type(module)) for name, module in base.named_modules()]
    values = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in base.named_parameters()}
    with pytest.raises(ChainError, match=message):
        load_chain(base, source)
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    for name, tensor in base.named_parameters():
        assert torch.equal(tensor, values[name][0]) and tensor.requires_grad == values[name][1]
    assert not hasattr(base, "peft_config")


def header(**tensor: Any) -> Callable[[Path], object]:
    text = json.dumps({"a.lora_A.weight": {"dtype": "F32", **tensor}}).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or damaged"),
    "garbage": (lambda path: path.write_bytes(os.urandom(2048)), "truncated or damaged"),
    "long header": (lambda path: path.write_bytes(struct.pack("<Q", 2**62) + bytes(64)), "truncated or damaged"),
    "shape": (header(shape=[2**40, 2**20], data_offsets=[0, 64]), "truncated or damaged"),
    "offsets": (header(shape=[4, 4], data_offsets=[2**50, 2**50 + 64]), "truncated or damaged"),
    "LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "no tensors": (lambda path: save_file({}, path), "holds no tensors"),
    "no LoRA": (lambda path: save_file({"something": torch.zeros(2)}, path), "holds no LoRA matrices"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "missing": (lambda path: path.unlink(), f"has no file {SAFETENSORS_WEIGHTS_NAME}"),
    "a pickle": (lambda path: path.rename(path.with_name("adapter_model.bin")), "pickle .adapter_model.bin."),
    "link": (
        lambda path: (path.rename(path.parents[2] / "away"), path.symlink_to(path.parents[2] / "away")),
        "leads out of its folder",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("task", ["first", "third"])
def test_damaged_weights(folder: Path, damage: str, task: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(folder / task / SAFETENSORS_WEIGHTS_NAME)
    check_refused(folder, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: tensor.to(dtype) for name, tensor in weights.items()})
        weights[sorted(weights)[3]].view(-1)[-1] = value

    edit_weights(folder / "first", spoil)
    check_refused(folder, "NaN or Inf")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    (folder / "first" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    load_chain(tiny("llama"), folder)  # there is safetensors too
    (folder / "first" / SAFETENSORS_WEIGHTS_NAME).unlink()
    check_refused(folder, "can run code")
    assert not (tmp_path / "touched").exists()


def test_links(folder: Path, tmp_path: Path) -> None:
    first = folder / "first"
    (first / SAFETENSORS_WEIGHTS_NAME).rename(first / "real")
    os.symlink("real", first / SAFETENSORS_WEIGHTS_NAME)
    load_chain(tiny("llama"), folder)
    snapshot = tmp_path / "models--somebody--chain" / "snapshots" / "abc"
    blobs = tmp_path / "models--somebody--chain" / "blobs"
    blobs.mkdir(parents=True)
    for task in ("first", "second", "third"):
        (snapshot / task).mkdir(parents=True)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.copy(folder / task / name, blobs / f"{task}-{name}")
            os.symlink(f"../../../blobs/{task}-{name}", snapshot / task / name)
    load_chain(tiny("llama"), snapshot)
    first.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", first)
    check_refused(folder, "leads out of its folder")
    load_chain(tiny("llama"), [first, folder / "second"])  # a folder that the user names is the user's choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "holds a list, not an object"),
        ('{"peft_type": "IA3"}', "peft_type 'IA3'"),
        ('{"peft_type": ["LORA"]}', "peft_type"),
        ('{"peft_type": "ASO_LORA", "penalty": "cubed"}', "not a valid config.*cubed"),
        ('{"peft_type": "ASO_LORA", "history": "first"}', "not a valid config.*list of task names"),
        ('{"peft_type": "ASO_LORA", "r": 0}', "r=0.*at least 1"),
        ('{"peft_type": "ASO_LORA", "lora_alpha": "big"}', "lora_alpha='big'.*a number"),
        ('{"peft_type": "ASO_LORA", "target_modules": 5}', "target_modules=5.*a list of names"),
        ('{"peft_type": "ASO_LORA", "similarities": {"a": []}}', "similarities=.*for each earlier task"),
        ('{"peft_type": "ASO_LORA", "soft_coefficients": {"a": "b"}}', "soft_coefficients=.*for each earlier task"),
        ('{"peft_type": "ASO_LORA", "history_hashes": {"a": 1}}', "history_hashes=.*SHA-256"),
        (" " * (17 * 2**20), "too many for its kind"),
    ],
)
def test_configs_that_are_none(folder: Path, text: str, message: str) -> None:
    (folder / "first" / CONFIG_NAME).write_text(text)
    check_refused(folder, message)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", ".hidden", "..", "a\0b"])
def test_task_names_that_lead_away(folder: Path, name: str) -> None:
    edit_config(folder / "first", task_name=name)
    check_refused(folder, "cannot be the name of a task")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "../../outside"}, "cannot be the name"),
        ({"folder": "/etc"}, "cannot be the name"),
        ({"task": "../second"}, "cannot be the name"),
        ({"folder": 3}, "cannot be the name"),
        ({"history": "first"}, "damaged"),
        ({"sha256": None}, "damaged"),
        ({"repo_id": "../../x", "revision": "0" * 40}, "no valid repository"),
        ({"repo_id": "user/chain", "revision": "main"}, "no valid repository"),
        ({"task": "other"}, "'second', and chain.json has 'other'"),
        (None, "not valid JSON"),
    ],
)
def test_chain_json_that_means_harm(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_chain(make_chain(), tmp_path / "chain")
    content = json.loads((folder / "chain.json").read_text())
    content["tasks"][1].update(change or {})
    if change == {"task": "other"}:
        content["tasks"].pop()
    (folder / "chain.json").write_text("[" * 100_000 if change is None else json.dumps(content))
    check_refused(folder, message)


def test_sources_that_are_none(folder: Path) -> None:
    (folder.parent / "none").mkdir()
    for source, message in (
        (folder / "missing", "There is no folder"),
        ("somebody/chain", "'somebody/chain' is no folder on this machine, and no repository"),
        (folder / "first" / CONFIG_NAME, "is a file"),
        ([], "list of folders and repositories is empty"),
        (folder.parent / "none", "There is no adapter in"),
    ):
        check_refused(source, message)
