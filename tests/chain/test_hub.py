"""A chain goes to the Hub and comes back, pinned, in one commit, in spite of what goes wrong on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, utils
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel

from peft_aso import ChainError, MissingHistoryError, load_history, push_chain, remove_task, save_chain, update_task
from tests.chain.chains import add, load, logits, make_chain, randomize, same_logits, settings, stock_adapter
from tests.chain.server import TOKEN, Hub
from tests.tiny_models import tiny


def tasks_in(hub: Hub, repo: str) -> list[dict[str, Any]]:
    return json.loads(hub.files(repo)["chain.json"])["tasks"]


def test_a_chain_in_one_repository(hub: Hub) -> None:
    model = make_chain()
    model.base_model.set_soft_coefficients({"first": 0.5, "second": 0.25}, similarities={"first": 0.5, "second": 0.75})
    commits = push_chain(model, "user/chain", accuracy={"second": 71.25})
    assert commits == {"user/chain": hub.repos["user/chain"].head}
    assert len(hub.repos["user/chain"].commits) == 2, "the initial commit, and one with everything"
    files = hub.files("user/chain")
    tasks = {f"{task}/adapter_model.safetensors" for task in ("first", "second", "third", "merged")}
    assert tasks | {"chain.json", "README.md", "similarity.png"} <= set(files)
    card = files["README.md"].decode()
    assert "base_model_relation: adapter" in card and "library_name: peft" in card and "71.2" in card
    assert '"user/chain")  # all tasks' in card and "second (0.75)" in card
    found = load("user/chain")
    same_logits(found, model)
    assert found.peft_config["second"].origin["revision"] == commits["user/chain"]
    assert load("user/chain", tasks=["second"]).base_model.history == ("first",)
    same_logits(PeftModel.from_pretrained(tiny("llama"), "user/chain", subfolder="merged"), model)
    assert push_chain(model, "user/chain", accuracy={"second": 71.25}) == commits, "nothing has changed"
    push_chain(add(load("user/chain"), "fourth", **settings()), "user/chain", merged=False)
    same_logits(load("user/chain", revision=commits["user/chain"]), model)
    with pytest.raises(ValueError, match="one repository"):
        load(["user/chain"], revision=commits["user/chain"])


def test_only_what_is_needed_is_fetched_and_then_it_works_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_chain(tasks={"a[1]": {}, "b*": {}, "ä c?": {}})
    push_chain(model, "user/chain")
    hub.requests.clear()
    load("user/chain", tasks=["a[1]"])
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert not any("b*" in path or "merged" in path or "README" in path for path in fetched)
    load("user/chain")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    getattr(utils, "reset_sessions", lambda: None)()
    hub.requests.clear()
    same_logits(load("user/chain"), model)
    assert not hub.requests
    with pytest.raises(ChainError, match="'user/other' is no folder on this machine, and no repository.*offline"):
        load("user/other")


def test_a_repository_a_task_pins_its_history(hub: Hub) -> None:
    model = make_chain()
    commits = push_chain(model, "user/chain", per_task=True)
    assert list(commits) == ["user/chain-first", "user/chain-second", "user/chain-third"]
    for count, repo in enumerate(commits):
        assert [entry.get("revision") for entry in tasks_in(hub, repo)] == [*list(commits.values())[:count], None]
        assert "adapter_config.json" in hub.files(repo), "at the root, where PEFT looks"
    same_logits(load("user/chain-third"), model)
    same_logits(load(list(commits)), model)
    with pytest.warns(UserWarning, match=r"on top of \['first', 'second'\]"):
        found = PeftModel.from_pretrained(tiny("llama"), "user/chain-third")
    with pytest.raises(MissingHistoryError, match=r"'first', 'second'.*load_chain"):
        logits(found)
    with pytest.warns(UserWarning, match=r"on top of \['first'\]"):
        found.load_adapter("user/chain-second", adapter_name="b")
    found.load_adapter("user/chain-first", adapter_name="a")
    same_logits(found.eval(), model)


def test_pefts_own_push_and_stock_adapters(hub: Hub, tmp_path: Path) -> None:
    model = make_chain()
    model.push_to_hub("user/own")
    same_logits(load("user/own"), model)
    stock = stock_adapter(tmp_path)
    stock.push_to_hub("user/stock")
    found = load_history(tiny("llama"), "user/stock")
    assert list(found.peft_config) == ["stock"]
    same_logits(found, stock)


def test_others_go_on_with_a_chain_and_pin_what_they_went_on_with(hub: Hub, tmp_path: Path) -> None:
    push_chain(make_chain(), "alice/chain")
    theirs = hub.repos["alice/chain"].head
    model = add(load("alice/chain", trainable=True), "fourth", **settings())
    commits = push_chain(model, "bob/more", per_task=True)
    assert list(commits) == ["bob/more-fourth"], "what is on the Hub is pinned there"
    assert [(e["repo_id"], e["revision"], e["folder"]) for e in tasks_in(hub, "bob/more-fourth")[:3]] == [
        ("alice/chain", theirs, name) for name in ("first", "second", "third")
    ]
    assert f"alice/chain/tree/{theirs}" in hub.files("bob/more-fourth")["README.md"].decode()
    other = hub.files("alice/chain")["second/adapter_model.safetensors"]
    hub.put("alice/chain", {"first/adapter_model.safetensors": other})
    same_logits(load("bob/more-fourth"), model)
    with pytest.raises(ChainError, match="'first'.* other weights"):
        load("alice/chain")
    folder = save_chain(model, tmp_path / "local")
    push_chain(make_chain(tasks={"first": {}}), "alice/copy")
    same_logits(load(["alice/chain", "alice/copy"], strict=False), load("alice/chain", strict=False))
    with pytest.raises(ChainError, match="Two folders hold a task called 'first'"):
        load(["bob/more-fourth", folder / "first", tmp_path / "local" / "first"])
    push_chain(make_chain(tasks={"first": {}}), "alice/first")
    same_logits(load(["alice/first", *(folder / task for task in ("second", "third", "fourth"))]), model)


def test_a_push_that_dies_leaves_the_old_chain(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    model = make_chain()
    push_chain(model, "user/chain")
    before = hub.repos["user/chain"].head
    longer = add(load("user/chain"), "fourth", **settings())
    for status, error in ((None, Exception), (503, HfHubHTTPError)):
        hub.faults = [("POST", "/commit/", status)] * 20
        with pytest.raises(error):
            push_chain(longer, "user/chain")
        assert len(hub.faults) < 20
    hub.faults.clear()
    assert hub.repos["user/chain"].head == before
    same_logits(load("user/chain"), model)
    push_chain(longer, "user/chain")
    if not hasattr(utils, "reset_sessions"):  # huggingface_hub 1 goes on with a broken download
        hub.faults = [("GET", "fourth/adapter_model.safetensors", None)]
    same_logits(load("user/chain"), longer)
    assert not hub.faults


def test_a_private_repository(hub: Hub) -> None:
    model = make_chain()
    with pytest.raises(HfHubHTTPError):
        push_chain(model, "user/chain", token="hf_wrong")
    push_chain(model, "user/chain", private=True, token=TOKEN)
    with pytest.raises(ChainError, match="private .log in"):
        load("user/chain", token=False)


def test_a_second_writer_is_a_conflict_and_only_removed_tasks_go(hub: Hub) -> None:
    push_chain(make_chain(), "user/chain")
    mine, theirs = (add(load("user/chain"), name, **settings()) for name in ("mine", "theirs"))
    hub.before_commit = lambda: hub.put("user/chain", {"note.txt": b"somebody was here"})
    with pytest.raises(HfHubHTTPError) as refused:
        push_chain(mine, "user/chain")
    assert refused.value.response.status_code == 412
    push_chain(mine, "user/chain")
    with pytest.raises(ChainError, match="user/chain holds 'mine', which would be lost: nothing was written"):
        push_chain(theirs, "user/chain")
    assert set(hub.files("user/chain")) >= {"note.txt", "mine/adapter_config.json"}
    push_chain(theirs, "user/chain", overwrite=True)
    assert "note.txt" in hub.files("user/chain") and "mine/adapter_config.json" not in hub.files("user/chain")
    remove_task(theirs, "second")
    push_chain(theirs, "user/chain")
    assert not any(path.startswith("second/") for path in hub.files("user/chain")), "a removed task goes"
    assert [task["task"] for task in tasks_in(hub, "user/chain")] == ["first", "third", "theirs"]
    same_logits(load("user/chain"), theirs)


def test_a_repository_a_task_is_refused_before_any_of_them_is_written(hub: Hub) -> None:
    push_chain(make_chain(tasks={"x": {}, "second": {}}), "user/own", per_task=True)
    before = {name: repo.head for name, repo in hub.repos.items()}
    with pytest.raises(ChainError, match="user/own-second holds 'x'"):
        push_chain(make_chain(), "user/own", per_task=True)
    assert {name: repo.head for name, repo in hub.repos.items()} == before


def test_a_repository_with_a_pickle(hub: Hub) -> None:
    push_chain(make_chain(), "eve/chain", merged=False)
    hub.put("eve/chain", {"second/adapter_model.safetensors": None, "second/adapter_model.bin": b"\x80\x04"})
    hub.requests.clear()
    with pytest.raises(ChainError, match="has no file adapter_model.safetensors"):
        load("eve/chain")
    assert not any(".bin" in path for _, path in hub.requests), "it is not even fetched"


def test_a_task_is_updated_to_a_new_revision(hub: Hub) -> None:
    push_chain(make_chain(), "user/chain")
    newer = load("user/chain", trainable=True)
    old = newer.peft_config["second"].origin
    randomize(newer, "second")
    with pytest.warns(UserWarning, match="trained on top of other weights of 'second'"):
        push_chain(newer, "user/newer")
    model = add(load("user/chain"), "fourth", **settings())
    before = logits(model)  # the history has been in use
    update_task(model, "second", "user/newer")
    assert model.peft_config["second"].origin["repo_id"] == "user/newer"
    assert model.base_model.adapter_hash("second") == newer.base_model.adapter_hash("second")
    push_chain(model, "user/chain")
    same_logits(load("user/chain"), model)
    update_task(model, "second", "user/chain", revision=old["revision"])
    assert logits(model).equal(before)


def test_the_code_in_the_guide_runs(hub: Hub, tmp_path: Path) -> None:
    stock_adapter(tmp_path)
    hub.put("friend/stock-lora", {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "hub.md").read_text(), re.S)
    model = make_chain(tasks={"mood": {}, "topic": {}})
    names = {"model": model, "base": tiny("llama"), "fresh": lambda: tiny("llama")}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/hub.md, block {number + 1}", "exec"), names)
        if number == 1:
            same_logits(names["model"], model)
    assert len(blocks) == 5 and list(names["model"].peft_config) == ["stock"]
    assert set(hub.repos) == {"you/support", "friend/more", "friend/more-urgency", "friend/stock-lora"}
