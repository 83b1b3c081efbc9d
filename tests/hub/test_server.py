"""The server that the Hub's tests run against: what the real client says to it, and what it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub.server import Hub


def test_what_is_pushed_comes_back(hub: Hub, tmp_path: Path) -> None:
    api = HfApi()
    api.create_repo("user/thing")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("user/thing")
    api.create_repo("user/thing", exist_ok=True)
    content = {"a.json": b"{}", "b/large.safetensors": bytes(range(256)) * 100}
    first = api.create_commit(
        "user/thing", [CommitOperationAdd(path, data) for path, data in content.items()], commit_message="one"
    )
    assert hub.files("user/thing").items() >= content.items()
    folder = Path(snapshot_download("user/thing", cache_dir=tmp_path))
    assert {path: (folder / path).read_bytes() for path in content} == content
    assert folder.name == first.oid
    hub.cut("GET", "/cdn/", after=1000)
    hub.fail("HEAD", "a.json", 503)
    again = Path(snapshot_download("user/thing", cache_dir=tmp_path / "other"))
    assert (again / "b/large.safetensors").read_bytes() == content["b/large.safetensors"]
    assert not hub.faults


def test_a_parent_that_is_not_the_newest_is_refused(hub: Hub) -> None:
    api = HfApi()
    api.create_repo("user/thing")
    parent = hub.repos["user/thing"].head.oid
    add = [CommitOperationAdd("a.json", b"{}")]
    hub.put("user/thing", {"b.json": b"{}"})
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("user/thing", add, commit_message="late", parent_commit=parent)
    assert refused.value.response.status_code == 412 and "a.json" not in hub.files("user/thing")


def test_what_is_not_there_or_not_allowed(hub: Hub) -> None:
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("user/none")
    hub.put("user/thing", {"a.json": b"{}"})
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("user/thing", revision="0" * 40)
    hub.repos["user/thing"].private = True
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("user/thing")
    assert HfApi().model_info("user/thing").sha == hub.repos["user/thing"].head.oid
