"""Reading adapter folders: what is unsafe, damaged or not an adapter is named as such, before anything
loads.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso.chain import ChainError
from peft_aso.chain.reading import existing_folder, find_adapters, read_adapter
from tests.chain.chains import make_chain, stock_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_chain().save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A chain's folder to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "chain"))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_reads_config_and_weights(folder: Path) -> None:
    adapter = read_adapter(folder / "second")
    assert (adapter.name, adapter.history, adapter.is_stock) == ("second", ["first"], False)
    weights = adapter.weights()
    assert weights.keys() == load_file(folder / "second" / SAFETENSORS_WEIGHTS_NAME).keys()


def test_weights_do_not_hang_on_the_file(folder: Path) -> None:
    path = folder / "first" / SAFETENSORS_WEIGHTS_NAME
    weights = read_adapter(folder / "first").weights()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(len(data[-4096:]))
    with path.open("r+b") as file:  # in place, as a saving over it would
        file.write(data)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_stock_adapter_is_recognised(tmp_path: Path) -> None:
    stock_adapter(tmp_path / "plain")
    adapter = read_adapter(tmp_path / "plain")
    assert (adapter.name, adapter.history, adapter.is_stock) == ("plain", [], True)


def test_finds_subfolders_and_the_root(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    (folder / "empty").mkdir()
    shutil.copy(folder / "first" / CONFIG_NAME, folder / ".hidden" / CONFIG_NAME)
    assert [path.name for path in find_adapters(folder)] == ["first", "second", "third"]
    shutil.copy(folder / "first" / CONFIG_NAME, folder / CONFIG_NAME)
    assert find_adapters(str(folder))[0] == folder
    assert find_adapters([folder / "third", folder / "first"]) == [folder / "third", folder / "first"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing", "There is no folder .*user/chain"),
        (lambda path: "somebody/chain", "There is no folder 'somebody/chain'"),
        (lambda path: path / "first" / CONFIG_NAME, "is a file"),
        (lambda path: [], "list of adapter folders is empty"),
        (lambda path: path.parent / "none", "There is no adapter in"),
    ],
)
def test_sources_that_are_none(folder: Path, make: Any, message: str) -> None:
    (folder.parent / "none").mkdir()
    with pytest.raises(ChainError, match=message):
        find_adapters(make(folder))


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt", "weights.pkl"])
def test_pickles_are_not_read(folder: Path, name: str) -> None:
    (folder / "first" / SAFETENSORS_WEIGHTS_NAME).unlink()
    (folder / "first" / name).write_bytes(b"\x80\x04")
    with pytest.raises(ChainError, match=f"pickle \\({name}\\).*Only safetensors .*save_pretrained"):
        read_adapter(folder / "first")


def test_a_pickle_beside_the_weights_is_ignored(folder: Path) -> None:
    (folder / "first" / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert read_adapter(folder / "first").weights()


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(2048))


def spoil_long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def spoil_absurd_shape(path: Path) -> None:
    header = {"a.lora_A.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 64]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def spoil_offsets(path: Path) -> None:
    header = {"a.lora_A.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [2**50, 2**50 + 64]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


@pytest.mark.parametrize(
    "spoil",
    [spoil_truncated, spoil_empty, spoil_garbage, spoil_long_header, spoil_absurd_shape, spoil_offsets],
)
def test_damaged_files(folder: Path, spoil: Any) -> None:
    spoil(folder / "first" / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(ChainError, match="truncated or damaged; nothing was loaded"):
        read_adapter(folder / "first").weights()


def test_lfs_pointer(folder: Path) -> None:
    (folder / "first" / SAFETENSORS_WEIGHTS_NAME).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ChainError, match="git lfs pull"):
        read_adapter(folder / "first").weights()


def test_no_tensors(folder: Path) -> None:
    save_file({}, folder / "first" / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(ChainError, match="holds no tensors"):
        read_adapter(folder / "first").weights()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf(folder: Path, value: float, dtype: torch.dtype) -> None:
    path = folder / "first" / SAFETENSORS_WEIGHTS_NAME
    weights = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    spoilt = sorted(weights)[3]
    weights[spoilt].view(-1)[-1] = value
    save_file(weights, path)
    with pytest.raises(ChainError, match=f"'first' hold NaN or Inf .{spoilt}"):
        read_adapter(folder / "first").weights()


@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "first" / name).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "first" / name)
    with pytest.raises(ChainError, match="leads out of its folder"):
        read_adapter(folder / "first")


def test_linked_subfolder(folder: Path, tmp_path: Path) -> None:
    (folder / "first").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "first")
    with pytest.raises(ChainError, match="leads out of its folder"):
        find_adapters(folder)
    # a folder that the user names is the user's choice
    assert read_adapter(find_adapters([folder / "first"])[0]).name == "first"


def test_links_within_the_folder_and_in_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    first = folder / "first"
    (first / SAFETENSORS_WEIGHTS_NAME).rename(first / "real")
    os.symlink("real", first / SAFETENSORS_WEIGHTS_NAME)
    assert read_adapter(first).weights()
    repository = tmp_path / "models--somebody--chain"
    snapshot = repository / "snapshots" / "abc" / "first"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, source in ((CONFIG_NAME, first / CONFIG_NAME), (SAFETENSORS_WEIGHTS_NAME, first / "real")):
        shutil.copy(source, repository / "blobs" / name)
        os.symlink(f"../../../blobs/{name}", snapshot / name)
    assert read_adapter(find_adapters(repository / "snapshots" / "abc")[0]).weights()


def test_not_a_regular_file(folder: Path) -> None:
    (folder / "first" / SAFETENSORS_WEIGHTS_NAME).unlink()
    os.mkfifo(folder / "first" / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(ChainError, match="not a regular file"):
        read_adapter(folder / "first")


@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / "first" / name).unlink()
    with pytest.raises(ChainError, match=f"has no file {name}"):
        read_adapter(folder / "first")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "holds a list, not an object"),
        ("{}", "peft_type None"),
        ('{"peft_type": "IA3"}', "peft_type 'IA3'.*Other methods cannot"),
        ('{"peft_type": ["LORA"]}', "peft_type"),
        ('{"peft_type": "ASO_LORA", "penalty": "cubed"}', "not a valid config.*cubed"),
        ('{"peft_type": "ASO_LORA", "history": "first"}', "not a valid config.*list of task names"),
        ('{"peft_type": "ASO_LORA", "attribution": {"steps": 0}}', "not a valid config.*steps"),
        ('{"peft_type": "ASO_LORA", "r": 0}', "r=0.*at least 1"),
        ('{"peft_type": "ASO_LORA", "lora_alpha": "big"}', "lora_alpha='big'.*a number"),
        ('{"peft_type": "ASO_LORA", "target_modules": 5}', "target_modules=5.*a list of names"),
        ('{"peft_type": "ASO_LORA", "similarities": 1}', "similarities=1.*for each earlier task"),
        ('{"peft_type": "ASO_LORA", "similarities": {"a": []}}', "similarities=.*for each earlier task"),
        ('{"peft_type": "ASO_LORA", "soft_coefficients": {"a": "b"}}', "soft_coefficients=.*for each earlier task"),
    ],
)
def test_configs_that_are_none(folder: Path, text: str, message: str) -> None:
    (folder / "first" / CONFIG_NAME).write_text(text)
    with pytest.raises(ChainError, match=message):
        read_adapter(folder / "first")


def test_absurdly_large_config(folder: Path) -> None:
    with (folder / "first" / CONFIG_NAME).open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ChainError, match="no adapter's config"):
        read_adapter(folder / "first")


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", ".hidden", "..", "a\0b"])
def test_task_names_that_lead_away(folder: Path, name: str) -> None:
    edit_config(folder / "first", task_name=name)
    with pytest.raises(ChainError, match="cannot be the name of a task"):
        read_adapter(folder / "first")


def test_no_task_name_is_the_folder(folder: Path) -> None:
    edit_config(folder / "first", task_name=None)
    assert read_adapter(folder / "first").name == "first"


def test_existing_folder_gives_the_path(tmp_path: Path) -> None:
    assert existing_folder(str(tmp_path)) == tmp_path
