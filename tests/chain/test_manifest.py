"""chain.json: fingerprints that do not depend on the dtype, and what a damaged manifest says."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_aso.chain import ChainError
from peft_aso.chain.manifest import MANIFEST_NAME, read_manifest, weights_hash
from peft_aso.tuner.persistence import ATTRIBUTION_KEY

ENTRY = {"task": "a", "folder": "a", "history": [], "sha256": "0"}


def write(folder: Path, **values: Any) -> None:
    content = {"format": "peft_aso chain", "format_version": 1, "tasks": [ENTRY], **values}
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def test_hash_is_of_values_not_of_files() -> None:
    half = {"b": torch.randn(3, 4).bfloat16(), "a": torch.randn(4, 2).bfloat16()}
    whole = {name: half[name].float() for name in ("a", "b")}
    strided = {name: tensor.T.contiguous().T for name, tensor in whole.items()}
    attributed = {**whole, ATTRIBUTION_KEY: torch.randn(5)}
    assert weights_hash(half) == weights_hash(whole) == weights_hash(strided) == weights_hash(attributed)


@pytest.mark.parametrize("change", ["value", "name", "shape", "sign"])
def test_hash_sees_changes(change: str) -> None:
    weights = {"a": torch.randn(2, 6), "b": torch.zeros(2)}
    before = weights_hash(weights)
    if change == "value":
        weights["a"][1, 5] = torch.nextafter(weights["a"][1, 5], torch.tensor(9.0))
    elif change == "name":
        weights["c"] = weights.pop("b")
    elif change == "shape":
        weights["a"] = weights["a"].view(3, 4)
    else:
        weights["b"][0] = -0.0
    assert weights_hash(weights) != before


def test_hash_written_out() -> None:
    """The fingerprint may never change: chains are on disks with it."""
    weights = {"b": torch.tensor([[1.0, -2.5]]), "a": torch.tensor([0.5])}
    parts = [b"a [1]\n", struct.pack("<f", 0.5), b"b [1, 2]\n", struct.pack("<2f", 1.0, -2.5)]
    assert weights_hash(weights) == hashlib.sha256(b"".join(parts)).hexdigest()


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_reads_tasks_in_order(tmp_path: Path) -> None:
    write(tmp_path, tasks=[{**ENTRY, "task": "z", "folder": "z"}, ENTRY])
    entries = read_manifest(tmp_path)
    assert entries is not None
    assert list(entries) == ["z", "a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "format version 2; this package reads up to 1. Upgrade"),
        ({"format": "something"}, "was not written by save_chain"),
        ({"tasks": [{"task": "a"}]}, "was not written by save_chain"),
        ({"tasks": 3}, "is damaged"),
        ({"tasks": [{}]}, "is damaged"),
        ({"tasks": [{**ENTRY, "history": 3}]}, "was not written by save_chain"),
        ({"tasks": [{**ENTRY, "history": [["b"]]}]}, "was not written by save_chain"),
        ({"left_out": 3}, "is damaged"),
        ({"left_out": ["a"]}, "is damaged"),
        ({"tasks": [{**ENTRY, "folder": "../a"}]}, "cannot be the name of a task"),
        ({"tasks": [{**ENTRY, "task": "/etc"}]}, "cannot be the name of a task"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    write(tmp_path, **values)
    with pytest.raises(ChainError, match=message):
        read_manifest(tmp_path)


def test_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"format": ')
    with pytest.raises(ChainError, match="is damaged.*can be read without it"):
        read_manifest(tmp_path)
