"""A chain goes to the Hub and comes back, whole, pinned and in spite of what goes wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel, get_peft_model

from peft_aso import ASOLoraConfig, ChainError, MissingHistoryError, load_chain, push_chain, save_chain
from peft_aso.chain.manifest import MANIFEST_NAME
from tests.chain.chains import make_chain, randomize, settings
from tests.hub.server import TOKEN, Hub
from tests.tiny_models import tiny, tiny_batch


def base() -> Any:
    torch.manual_seed(0)
    return tiny("llama").eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model(**tiny_batch(model)).logits


def same(model: Any, other: Any) -> None:
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-4)


def extended(model: Any, task: str) -> Any:
    """One more task on top, with random weights."""
    model.add_adapter(task, ASOLoraConfig(**settings("llama")))
    model.set_adapter(task)
    randomize(model, task)
    return model.eval()


def test_a_chain_in_one_repository(hub: Hub) -> None:
    model = make_chain()
    commits = push_chain(model, "user/chain", accuracy={"second": 71.25})
    assert commits == {"user/chain": hub.repos["user/chain"].head.oid}
    assert len(hub.repos["user/chain"].commits) == 2, "the initial commit, and one with everything"
    files = hub.files("user/chain")
    tasks = {f"{task}/adapter_model.safetensors" for task in ("first", "second", "third", "merged")}
    assert tasks | {"chain.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert "base_model_relation: adapter" in card and "library_name: peft" in card and "71.2" in card
    assert 'load_chain(base, "user/chain")' in card
    found = load_chain(base(), "user/chain")
    same(found, model)
    assert found.base_model.history == ("first", "second")
    assert found.peft_config["second"].origin["revision"] == commits["user/chain"]
    assert load_chain(base(), "user/chain", tasks=["second"]).base_model.history == ("first",)
    same(PeftModel.from_pretrained(base(), "user/chain", subfolder="merged"), model)


def test_only_what_is_needed_is_fetched_and_then_it_works_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_chain()
    push_chain(model, "user/chain")
    hub.requests.clear()
    load_chain(base(), "user/chain", tasks=["first"])
    fetched = [path for method, path in hub.requests if method == "GET" and ("/resolve/" in path or "/cdn/" in path)]
    assert not any("second" in path or "merged" in path or "README" in path for path in fetched)
    load_chain(base(), "user/chain")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    same(load_chain(base(), "user/chain"), model)
    assert not hub.requests
    with pytest.raises(ChainError, match="cannot be reached"):
        load_chain(base(), "user/other")


def test_a_revision_is_what_was_there_then(hub: Hub) -> None:
    model = make_chain()
    first = push_chain(model, "user/chain", merged=False)["user/chain"]
    before = logits(model)
    push_chain(extended(model, "fourth"), "user/chain", merged=False)
    assert load_chain(base(), "user/chain").base_model.history == ("first", "second", "third")
    torch.testing.assert_close(logits(load_chain(base(), "user/chain", revision=first)), before, atol=1e-5, rtol=1e-4)
    with pytest.raises(ChainError, match="no revision"):
        load_chain(base(), "user/chain", revision="0" * 40)
    with pytest.raises(ValueError, match="one repository"):
        load_chain(base(), ["user/chain"], revision=first)


def test_a_repository_a_task_pins_its_history(hub: Hub) -> None:
    model = make_chain()
    commits = push_chain(model, "user/chain", per_task=True)
    assert list(commits) == ["user/chain-first", "user/chain-second", "user/chain-third"]
    for count, repo in enumerate(commits):
        entries = json.loads(hub.files(repo)[MANIFEST_NAME])["tasks"]
        assert [entry.get("revision") for entry in entries] == [*list(commits.values())[:count], None]
        assert "adapter_config.json" in hub.files(repo), "at the root, where PEFT looks"
    same(load_chain(base(), "user/chain-third"), model)
    same(load_chain(base(), list(commits)), model)
    alone = PeftModel.from_pretrained(base(), "user/chain-first")
    same(alone, load_chain(base(), "user/chain-first"))


def test_pefts_own_loader_says_what_is_missing_and_what_brings_it(hub: Hub) -> None:
    model = make_chain()
    push_chain(model, "user/chain", per_task=True)
    with pytest.warns(UserWarning, match=r"on top of \['first', 'second'\]"):
        found = PeftModel.from_pretrained(base(), "user/chain-third")
    with pytest.raises(MissingHistoryError, match=r"'first', 'second'.*load_chain\(base, 'user/chain-third'\)"):
        logits(found)
    same(load_chain(base(), "user/chain-third"), model)
    with pytest.warns(UserWarning, match=r"on top of \['first'\]"):
        found.load_adapter("user/chain-second", adapter_name="b")
    found.load_adapter("user/chain-first", adapter_name="a")
    same(found.eval(), model)


def test_pefts_own_push_can_be_loaded(hub: Hub) -> None:
    model = make_chain()
    model.push_to_hub("user/own")
    same(load_chain(base(), "user/own"), model)
    with pytest.warns(UserWarning, match="on top of"):
        found = PeftModel.from_pretrained(base(), "user/own", subfolder="second")
    with pytest.raises(MissingHistoryError, match=r"load_chain\(base, 'user/own'\)"):
        logits(found)
    one = get_peft_model(base(), ASOLoraConfig(**settings("llama"), task_name="mood")).eval()
    randomize(one, "default")
    one.push_to_hub("user/mood")
    same(PeftModel.from_pretrained(base(), "user/mood"), one)
    assert list(load_chain(base(), "user/mood").peft_config) == ["mood"]


def test_others_go_on_with_a_chain_and_pin_what_they_went_on_with(hub: Hub) -> None:
    push_chain(make_chain(), "alice/chain")
    theirs = hub.repos["alice/chain"].head.oid
    model = extended(load_chain(base(), "alice/chain", trainable=True), "fourth")
    commits = push_chain(model, "bob/more", per_task=True)
    assert list(commits) == ["bob/more-fourth"], "what lies on the Hub is pinned there"
    entries = json.loads(hub.files("bob/more-fourth")[MANIFEST_NAME])["tasks"]
    assert [(e["repo_id"], e["revision"], e["folder"]) for e in entries[:3]] == [
        ("alice/chain", theirs, name) for name in ("first", "second", "third")
    ]
    assert f"alice/chain/tree/{theirs}" in hub.files("bob/more-fourth")["README.md"].decode()
    changed = {path: data for path, data in hub.files("alice/chain").items() if path.startswith("second/")}
    hub.put("alice/chain", {"first/" + path.split("/")[1]: data for path, data in changed.items()})
    same(load_chain(base(), "bob/more-fourth"), model)


def test_another_history_than_the_one_trained_on_is_an_error_with_both_hashes(hub: Hub) -> None:
    model = make_chain()
    push_chain(model, "user/chain", per_task=True)
    entries = json.loads(hub.files("user/chain-second")[MANIFEST_NAME])["tasks"]
    randomize(model, "first")
    push_chain(make_chain(tasks={"first": {}}, seed=5), "eve/chain", per_task=True)
    other = json.loads(hub.files("eve/chain-first")[MANIFEST_NAME])["tasks"][0]["sha256"]
    with pytest.raises(ChainError) as error:
        load_chain(base(), ["eve/chain-first", "user/chain-second"])
    assert entries[0]["sha256"] in str(error.value) and other in str(error.value)
    with pytest.warns(UserWarning, match="other weights than these"):
        load_chain(base(), ["eve/chain-first", "user/chain-second"], strict=False)
    files = hub.files("eve/chain-first")
    hub.put("user/chain-first", {"adapter_model.safetensors": files["adapter_model.safetensors"]})
    with pytest.raises(ChainError, match="are not those that save_chain wrote"):
        load_chain(base(), "user/chain-first")
    load_chain(base(), "user/chain-second")  # at the commit that it pins, all is as it was


def test_a_folder_and_a_repository_together(hub: Hub, tmp_path: Path) -> None:
    model = make_chain()
    push_chain(model, "user/chain", tasks=["first"])
    save_chain(model, tmp_path / "local")
    same(load_chain(base(), ["user/chain", tmp_path / "local" / "second", tmp_path / "local" / "third"]), model)


def test_a_push_that_dies_leaves_the_old_chain(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    model = make_chain()
    push_chain(model, "user/chain")
    before = hub.repos["user/chain"].head.oid
    model = extended(model, "fourth")
    hub.cut("PUT", "/lfs/", after=100, times=20)
    with pytest.raises(ChainError, match="broke off.*see what was there before"):
        push_chain(model, "user/chain")
    hub.faults.clear()
    hub.fail("POST", "/commit/", 503, times=20)
    with pytest.raises(ChainError, match="broke off.*503"):
        push_chain(model, "user/chain")
    hub.faults.clear()
    assert hub.repos["user/chain"].head.oid == before
    assert load_chain(base(), "user/chain").base_model.history == ("first", "second")
    push_chain(model, "user/chain")
    same(load_chain(base(), "user/chain"), model)


def test_a_second_writer_is_a_conflict(hub: Hub) -> None:
    model = make_chain()
    push_chain(model, "user/chain")
    mine, theirs = (extended(load_chain(base(), "user/chain"), name) for name in ("mine", "theirs"))

    def in_between(repo: str) -> None:
        hub.before_commit = None
        hub.put(repo, {"note.txt": b"somebody was here"})

    hub.before_commit = in_between
    with pytest.raises(ChainError, match="pushed to user/chain in between"):
        push_chain(mine, "user/chain")
    push_chain(mine, "user/chain")
    with pytest.raises(ChainError, match="has 'mine', which this model has not.*Nothing was pushed"):
        push_chain(theirs, "user/chain")
    randomize(mine, "second")
    with pytest.raises(ChainError, match="other weights for 'second'"):
        push_chain(mine, "user/chain")
    assert set(hub.files("user/chain")) >= {"note.txt", "mine/adapter_config.json"}


def test_a_repository_a_task_is_refused_before_any_of_them_is_written(hub: Hub) -> None:
    push_chain(make_chain(seed=7), "user/own", per_task=True, tasks=["first", "second"])
    del hub.repos["user/own-first"]
    before = {name: repo.head.oid for name, repo in hub.repos.items()}
    with pytest.raises(ChainError, match="user/own-second has other weights for .*Nothing was pushed"):
        push_chain(make_chain(seed=8), "user/own", per_task=True)
    assert {name: repo.head.oid for name, repo in hub.repos.items()} == before


def test_names_with_signs_that_patterns_have(hub: Hub) -> None:
    model = make_chain(tasks={"a[1]": {}, "b*": {}, "c?": {}})
    push_chain(model, "user/chain")
    same(load_chain(base(), "user/chain"), model)


def test_who_may_not_write_or_read(hub: Hub) -> None:
    model = make_chain()
    with pytest.raises(ChainError, match=r"may not write to user/chain.*hf auth login"):
        push_chain(model, "user/chain", token="hf_wrong")
    assert not hub.repos
    push_chain(model, "user/chain", private=True, token=TOKEN)
    assert hub.repos["user/chain"].private
    with pytest.raises(ChainError, match="private, log in"):
        load_chain(base(), "user/chain", token=False)
    same(load_chain(base(), "user/chain", token=TOKEN), model)


def test_a_download_that_is_cut_goes_on(hub: Hub) -> None:
    model = make_chain()
    push_chain(model, "user/chain")
    hub.cut("GET", "/cdn/", after=500)
    same(load_chain(base(), "user/chain"), model)
    assert not hub.faults
