"""A repository that means harm: a clear error each, nothing written outside the cache, nothing executed."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_aso import ChainError, load_chain, push_chain
from tests.chain.chains import make_chain
from tests.hub.server import Hub
from tests.tiny_models import tiny

Files = dict[str, bytes]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def manifest(files: Files, **changes: Any) -> Files:
    """The manifest with changes to the entry of its second task."""
    content = json.loads(files["chain.json"])
    content["tasks"][1].update(changes)
    return {"chain.json": json.dumps(content).encode()}


def config(files: Files, task: str, **changes: Any) -> Files:
    path = f"{task}/adapter_config.json"
    return {path: json.dumps({**json.loads(files[path]), **changes}).encode()}


BEYOND = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
WEIGHTS = "second/adapter_model.safetensors"
HARM: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a folder outside": (lambda f: manifest(f, folder="../../outside"), "cannot be the name"),
    "an absolute folder": (lambda f: manifest(f, folder="/etc"), "cannot be the name"),
    "a task outside": (lambda f: manifest(f, task="../second"), "cannot be the name"),
    "a repository outside": (lambda f: manifest(f, repo_id="../../x", revision="0" * 40), "no valid repository"),
    "a branch for a commit": (lambda f: manifest(f, repo_id="user/chain", revision="main"), "no valid repository"),
    "a manifest of lists": (lambda f: {"chain.json": b"[" * 100_000}, "damaged"),
    "10 GB in a header": (lambda f: {WEIGHTS: struct.pack("<Q", 10 * 2**30) + b"{}"}, "safetensors"),
    "a tensor beyond the file": (lambda f: {WEIGHTS: struct.pack("<Q", 64) + BEYOND.ljust(64)}, "safetensors"),
    "another method": (lambda f: config(f, "second", peft_type="IA3"), "peft_type 'IA3'"),
    "a name outside": (lambda f: config(f, "second", task_name="../../x"), "cannot be the name"),
    "a config of 17 MiB": (lambda f: {"second/adapter_config.json": b" " * (17 * 2**20)}, "no adapter's config"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_a_hostile_repository_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    push_chain(make_chain(), "eve/chain", merged=False)
    harm, message = HARM[name]
    hub.put("eve/chain", harm(hub.files("eve/chain")))
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    base = tiny("llama")
    with pytest.raises(ChainError, match=message):
        load_chain(base, "eve/chain")
    assert before == {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert not hasattr(base, "peft_config")


def test_a_cycle_without_a_manifest(hub: Hub) -> None:
    push_chain(make_chain(), "eve/chain", merged=False)
    files = hub.files("eve/chain")
    commit = hub.repos["eve/chain"].head
    del commit.files["chain.json"]
    hub.put("eve/chain", config(files, "first", history=["third"]))
    with pytest.raises(ChainError, match="cycle"):
        load_chain(tiny("llama"), "eve/chain")


def test_a_pickle_is_not_even_fetched(hub: Hub, tmp_path: Path) -> None:
    push_chain(make_chain(), "eve/chain", merged=False)
    del hub.repos["eve/chain"].head.files[WEIGHTS]
    touched = tmp_path / "touched"
    hub.put("eve/chain", {"second/adapter_model.bin": pickle.dumps(Bomb(touched))})
    hub.requests.clear()
    with pytest.raises(ChainError):
        load_chain(tiny("llama"), "eve/chain")
    assert not touched.exists() and not any(".bin" in path for _, path in hub.requests)


def test_another_base_model(hub: Hub) -> None:
    push_chain(make_chain(), "eve/chain", merged=False)
    with pytest.raises(ChainError):
        load_chain(tiny("llama", hidden_size=64), "eve/chain")
