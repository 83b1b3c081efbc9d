"""save_chain leaves the old chain or the new one, whatever happens, and nobody's files are lost by surprise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from peft_aso import ChainError, remove_task, save_chain
from peft_aso.tuner.model import weights_hash
from tests.chain.chains import (
    add,
    at_call,
    change_weights,
    content,
    edit,
    entries,
    load,
    logits,
    make_chain,
    randomize,
    same_logits,
    settings,
)
from tests.tiny_models import tiny


def test_what_is_written(tmp_path: Path) -> None:
    model = make_chain(tasks={"default": {"task_name": "first"}, "second": {"use_rslora": True}, "third": {"r": 3}})
    model.base_model.set_soft_coefficients({"first": 0.25, "second": 0.5}, similarities={"first": 0.75, "second": 0.5})
    folder = save_chain(model, tmp_path / "chain")
    assert folder == tmp_path / "chain"
    assert sorted(os.listdir(folder)) == ["chain.json", "first", "second", "third"]
    written = json.loads((folder / "chain.json").read_text())
    assert (written["format"], written["format_version"], "unfinished" in written) == ("peft_aso chain", 2, False)
    found = entries(folder)
    assert [entry["history"] for entry in found.values()] == [[], ["first"], ["first", "second"]]
    assert [(each["folder"], each["rank"]) for each in found.values()] == [("first", 2), ("second", 2), ("third", 3)]
    assert found["third"]["soft_coefficients"] == {"first": 0.25, "second": 0.5}
    assert found["third"]["similarities"] == {"first": 0.75, "second": 0.5}
    for task, entry in found.items():
        name = "default" if task == "first" else task
        digest = weights_hash(load_file(folder / task / SAFETENSORS_WEIGHTS_NAME), model.peft_config[name])
        assert entry["sha256"] == digest == model.base_model.adapter_hash(name)
    same_logits(load(folder), model)


def test_chosen_tasks_and_what_is_no_task(tmp_path: Path) -> None:
    model = make_chain()
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mix", combination_type="cat")
    assert list(entries(save_chain(model, tmp_path / "two", tasks=["second", "first"]))) == ["first", "second"]
    assert list(entries(save_chain(model, tmp_path / "all"))) == ["first", "second", "third"]
    for tasks, message in (
        (["third", "second"], "'third' was trained on top of 'first', which would not be"),
        (["fourth"], "no task 'fourth' in the model. There are: 'first'"),
        (["first", "first"], "named twice"),
        ([], "no task to save"),
    ):
        with pytest.raises(ChainError, match=message):
            save_chain(model, tmp_path / "none", tasks=tasks)
    for other in (tiny("llama"), get_peft_model(tiny("llama"), LoraConfig(**settings()))):
        with pytest.raises(ChainError, match="save_chain needs a PeftModel with ASO_LORA"):
            save_chain(other, tmp_path / "none")
    for name in ("sst2/v1", ".x", "a.b", "layers"):
        model.peft_config["third"].task_name = name
        with pytest.raises(ChainError):
            save_chain(model, tmp_path / "none")
    model.peft_config["third"].task_name = "third"
    make_chain(tasks={"default": {}}).save_pretrained(str(tmp_path / "peft"))
    (tmp_path / "file").touch()
    for place, message in (("peft", "the folder of an adapter"), ("file", "is a file")):
        with pytest.raises(ChainError, match=message):
            save_chain(model, tmp_path / place)
    assert not (tmp_path / "none").exists()


def test_only_what_changed_is_written_anew(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path)
    for name in ("notes.txt", "README.md", "second/mine.txt", "other/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    randomize(model, "third")
    save_chain(model, tmp_path)
    digest = entries(tmp_path)["third"]["sha256"]
    assert [entry["folder"] for entry in entries(tmp_path).values()] == ["first", "second", f"third-{digest[:8]}"]
    assert not (tmp_path / "third").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.exists())
    assert all((tmp_path / name).read_text() == "mine" for name in ("notes.txt", "README.md", "other/mine.txt"))
    same_logits(load(tmp_path), model)
    model.base_model.set_soft_coefficients({"first": 0.5, "second": 0.5})
    save_chain(load(tmp_path), tmp_path)  # unchanged
    save_chain(model, tmp_path)
    assert entries(tmp_path)["third"]["folder"] == "third", "the name is free again"
    assert load(tmp_path).base_model.soft_coefficients == {"first": 0.5, "second": 0.5}
    add(model, "fourth", **settings())
    (tmp_path / "fourth").mkdir()
    save_chain(model, tmp_path)
    assert entries(tmp_path)["fourth"]["folder"] != "fourth" and not os.listdir(tmp_path / "fourth")


def test_tasks_are_not_lost_by_surprise(tmp_path: Path) -> None:
    save_chain(make_chain(), tmp_path)
    before = content(tmp_path)
    for model, tasks in ((make_chain(tasks={"first": {}}, seed=1), None), (make_chain(), ["first", "second"])):
        with pytest.raises(ChainError, match="'third', which would be lost: nothing was written.*overwrite=True"):
            save_chain(model, tmp_path, tasks)
        assert content(tmp_path) == before
    longer = add(load(tmp_path), "fourth", **settings())
    save_chain(longer, tmp_path)
    remove_task(longer, "second")
    save_chain(longer, tmp_path)
    assert list(entries(tmp_path)) == ["first", "third", "fourth"] and not (tmp_path / "second").exists()
    same_logits(load(tmp_path), longer)
    other = make_chain(tasks={"mood": {}})
    save_chain(other, tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["chain.json", "mood"]
    (tmp_path / "chain.json").write_text("{")
    with pytest.raises(ChainError, match="not valid JSON.*overwrite=True"):
        save_chain(other, tmp_path)
    save_chain(other, tmp_path, overwrite=True)
    same_logits(load(tmp_path), other)


def test_what_chain_json_does_not_name_is_left_out_by_name(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path)
    add(model, "fourth", **settings())
    model.save_pretrained(str(tmp_path), selected_adapters=["fourth"])
    with pytest.warns(UserWarning, match="its chain.json does not name: 'fourth'.*save_chain"):
        loaded = load(tmp_path)
    assert loaded.active_adapters == ["third"]
    folders = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    save_chain(load(folders), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not name")
        assert load(tmp_path).active_adapters == ["fourth"]
    assert entries(tmp_path)["fourth"]["folder"] == "fourth", "the folder with the same content is taken over"


STEPS: dict[str, tuple[str, int]] = {
    **{f"the weights of task {n}": ("peft.peft_model.safe_save_file", n) for n in (1, 2, 3)},
    "chain.json": ("os.replace", 1),
    **{f"into place, {n}": ("os.rename", n) for n in (1, 2, 3)},
    "removing": ("shutil.rmtree", 5),
}


@pytest.mark.filterwarnings("ignore:.*does not name")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_first", [False, True])
def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_first: bool) -> None:
    folder, old, new = tmp_path / "chain", make_chain(seed=1), make_chain(seed=2)
    if not is_first:
        save_chain(old, folder)
    child = os.fork()
    if child == 0:
        try:
            at_call(monkeypatch, *STEPS[step], lambda: os.kill(os.getpid(), signal.SIGKILL))
            save_chain(new, folder)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if not is_first:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        loaded = load(folder)
        expected = old if torch.equal(logits(loaded), logits(old)) else new
        assert torch.equal(logits(loaded), logits(expected))
        assert list(loaded.peft_config) == list(expected.peft_config)
    elif os.WIFSIGNALED(status):
        try:
            same_logits(load(folder), new)
        except ChainError as error:
            assert "no adapter in" in str(error) or "no task to load" in str(error)
    save_chain(new, folder)
    used = {"chain.json", *(entry["folder"] for entry in entries(folder).values())}
    assert used == set(os.listdir(folder)) or step == "removing", "what the killed save wrote is used now"
    same_logits(load(folder), new)


@pytest.mark.parametrize("step", ["the weights of task 2", "into place, 2", "chain.json"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder, old, new = tmp_path / "chain", make_chain(seed=1), make_chain(seed=2)
    save_chain(old, folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        at_call(patch, *STEPS[step], Mock(side_effect=OSError(28, "No space left on device")))
        save_chain(new, folder)
    same_logits(load(folder), old)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    save_chain(new, folder)
    same_logits(load(folder), new)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_chain(make_chain(), tmp_path / "chain")


def check_strict(folder: Path, message: str) -> Any:
    with pytest.raises(ChainError, match=f"(?s){message}.*strict=False"):
        load(folder)
    with pytest.warns(UserWarning, match=message):
        return load(folder, strict=False)


def test_changed_weights_scale_history_and_missing_task(folder: Path) -> None:
    change_weights(folder / "second")
    check_strict(folder, r"'second'.* other weights or another scale.* sha256")
    save_chain(make_chain(), folder)
    edit(folder / entries(folder)["second"]["folder"], dict(lora_alpha=800))
    check_strict(folder, "'second'.* other weights or another scale")
    save_chain(make_chain(), folder)
    edit(folder / "third", dict(history=["first"]))
    model = check_strict(folder, r"'third'.* another history \['first'\], and chain.json has \['first', 'second'\]")
    assert model.base_model.tasks.histories["third"] == ("first",)
    shutil.rmtree(folder / "third")
    assert check_strict(folder, "lists the task 'third'.*not there").active_adapters == ["second"]


def test_the_history_that_a_task_was_trained_on_is_checked_without_chain_json(folder: Path) -> None:
    (folder / "chain.json").unlink()
    hashes = json.loads((folder / "third" / CONFIG_NAME).read_text())["history_hashes"]
    change_weights(folder / "first")
    with pytest.raises(ChainError, match=f"'second' was trained on top of 'first' with the sha256 {hashes['first']}"):
        load(folder)
    with pytest.warns(UserWarning, match="'third' was trained on top of 'first'"):
        loose = load(folder, strict=False)
    assert loose.peft_config["third"].history_hashes["first"] == loose.base_model.adapter_hash("first")
    save_chain(loose, folder.parent / "loose")
    load(folder.parent / "loose")
    edit(folder / "third", dict(history_hashes=None))
    edit(folder / "second", dict(history_hashes=None))  # as earlier versions wrote it
    load(folder)
