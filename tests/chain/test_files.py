"""Adapter folders that are unsafe, damaged or no adapters are refused, and the model is as before."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from peft_aso import ChainError, load_chain, save_chain
from tests.chain.chains import edit, load, make_chain, unchanged
from tests.tiny_models import tiny

Spoil = Callable[[Path], object]


def check_refused(source: Any, message: str, base: Any = None) -> None:
    """The error is raised and the base model has not changed at all."""
    base = tiny("llama") if base is None else base
    with unchanged(base), pytest.raises(ChainError, match=f"(?s){message}"):
        load_chain(base, source)


def header(**tensor: Any) -> Spoil:
    text = json.dumps({"a.lora_A.weight": {"dtype": "F32", **tensor}}).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def with_value(value: float, dtype: torch.dtype) -> Spoil:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: tensor.to(dtype) for name, tensor in weights.items()})
        weights[sorted(weights)[3]].view(-1)[-1] = value

    return lambda path: edit(path.parent, spoil)


HARM: list[tuple[Spoil | str | dict[str, Any], str]] = [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated or damaged"),
    (lambda path: path.write_bytes(b""), "truncated or damaged"),
    (lambda path: path.write_bytes(os.urandom(2048)), "truncated or damaged"),
    (lambda path: path.write_bytes(struct.pack("<Q", 2**62) + bytes(64)), "truncated or damaged"),
    (header(shape=[2**40, 2**20], data_offsets=[0, 64]), "truncated or damaged"),
    (header(shape=[4, 4], data_offsets=[2**50, 2**50 + 64]), "truncated or damaged"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (lambda path: save_file({"something": torch.zeros(2)}, path), "holds no LoRA matrices"),
    (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    (lambda path: path.unlink(), f"has no file {SAFETENSORS_WEIGHTS_NAME}"),
    (lambda path: path.symlink_to(path.rename(path.parents[2] / "away")), "leads out of its folder"),
    *((with_value(value, torch.float32), "NaN or Inf") for value in (float("nan"), float("inf"), -float("inf"))),
    (with_value(float("nan"), torch.bfloat16), "NaN or Inf"),
    ("{", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[1]", "holds a list, not an object"),
    (" " * (17 * 2**20), "too many for its kind"),
    (dict(peft_type="IA3"), "peft_type 'IA3'"),
    (dict(peft_type=["LORA"]), "peft_type"),
    (dict(penalty="cubed"), "not a valid config.*cubed"),
    (dict(history="first"), "not a valid config.*list of task names"),
    *((dict(r=r, history_hashes=None), "its config is wrong.*third") for r in (0, "2", None)),
    (dict(lora_alpha="big"), "its config is wrong.*third"),
    (dict(target_modules=5), "its config is wrong.*third"),
    *((dict(task_name=name), "cannot be the name of a task") for name in ("../up", "a/b", "a\\b", ".x", "..", "a\0b")),
]


@pytest.mark.parametrize(("spoil", "message"), HARM, ids=range(len(HARM)))
def test_files_that_are_damaged_or_mean_harm(folder: Path, spoil: Any, message: str) -> None:
    """Harm to the weights, or to the config: its whole text, or values in it."""
    if isinstance(spoil, str):
        (folder / "third" / CONFIG_NAME).write_text(spoil)
    elif isinstance(spoil, dict):
        edit(folder / "third", spoil)
    else:
        spoil(folder / "third" / SAFETENSORS_WEIGHTS_NAME)
    check_refused(folder, message)


def test_a_pickle_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    makes_a_folder = f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR."  # a pickle, as text
    (folder / "first" / "adapter_model.bin").write_text(makes_a_folder)
    load(folder)  # there is safetensors too
    (folder / "first" / SAFETENSORS_WEIGHTS_NAME).unlink()
    check_refused(folder, "pickle .adapter_model.bin., which can run code")
    assert not (tmp_path / "made").exists()
    pickle.loads(makes_a_folder.encode())
    assert (tmp_path / "made").exists(), "what it would have done"


def test_links(folder: Path, tmp_path: Path) -> None:
    first = folder / "first"
    (first / SAFETENSORS_WEIGHTS_NAME).rename(first / "real")
    os.symlink("real", first / SAFETENSORS_WEIGHTS_NAME)
    load(folder)
    first.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", first)
    check_refused(folder, "leads out of its folder")
    load([first, folder / "second"])  # a folder that the user names is the user's choice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"folder": folder}, "cannot be the name") for folder in ("../../outside", "/etc", 3)),
        *(({"task": task}, "cannot be the name") for task in ("../second", ".")),
        ({"history": "first"}, "damaged"),
        ({"sha256": None}, "damaged"),
        ({"repo_id": "../../x", "revision": "0" * 40}, "no valid repository"),
        ({"repo_id": "user/chain", "revision": "main"}, "no valid repository"),
        ({"task": "other", "history": []}, "another task second, and chain.json has other|which is not there"),
        (None, "not valid JSON"),
    ],
)
def test_chain_json_that_means_harm(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_chain(make_chain(), tmp_path / "chain")
    content = json.loads((folder / "chain.json").read_text())
    content["tasks"][1].update(change or {})
    (folder / "chain.json").write_text("[" * 100_000 if change is None else json.dumps(content))
    check_refused(folder, message)


def test_sources_that_are_none(folder: Path) -> None:
    (folder.parent / "none").mkdir()
    for source, message in (
        (folder / "missing", "There is no folder"),
        ("somebody/chain", "'somebody/chain' is no folder on this machine, and no repository"),
        (folder / "first" / CONFIG_NAME, "There is no folder"),
        ([], "list of folders and repositories is empty"),
        (folder.parent / "none", "There is no adapter in"),
    ):
        check_refused(source, message)
