"""save_chain leaves the old chain or the new one, whatever happens, and nobody's files are lost by surprise."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_aso import ChainError, export_lora, export_merged, remove_task, save_chain
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
    assert sorted(os.listdir(folder)) == ["README.md", "chain.json", "first", "second", "third"]
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
    assert sorted(os.listdir(tmp_path)) == ["README.md", "chain.json", "mood"]
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
    **{f"chain.json, {n}": ("os.replace", n) for n in (1, 2, 3)},
    "README.md": ("os.replace", 4),
    **{f"into place, {n}": ("os.rename", n) for n in (1, 2, 3)},
    **{f"removing, {n}": ("shutil.rmtree", 3 + n) for n in (1, 2, 3)},
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
    used = {"README.md", "chain.json", *(entry["folder"] for entry in entries(folder).values())}
    assert used == set(os.listdir(folder)), "what the killed save has left is used or removed"
    same_logits(load(folder), new)


@pytest.mark.parametrize("step", ["the weights of task 2", "into place, 2", "chain.json, 1", "chain.json, 2"])
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


def in_a_process(function: Callable[[], object]) -> int:
    """Start a process that calls the function; its number. It ends with 0 if there was no error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def test_killed_at_any_time(tmp_path: Path) -> None:
    """Twenty kills, each at a random time during a save (of about 50 ms) of one of two chains over the other."""
    folder, chains = tmp_path / "chain", [make_chain(seed=seed) for seed in (1, 2)]
    save_chain(chains[0], folder)
    expected = [logits(chain) for chain in chains]
    for number in range(20):
        child = in_a_process(lambda number=number: save_chain(chains[(number + 1) % 2], folder))
        time.sleep(random.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not name")
            found = logits(load(folder))
        assert any(torch.equal(found, each) for each in expected)
    save_chain(chains[0], folder)
    used = {"README.md", "chain.json", *(entry["folder"] for entry in entries(folder).values())}
    assert set(os.listdir(folder)) == used, "nothing that killed saves have left"


def test_two_savers_at_once(tmp_path: Path) -> None:
    folder, chains = tmp_path / "chain", [make_chain(seed=seed) for seed in (1, 2)]
    children = [in_a_process(lambda chain=chain: [save_chain(chain, folder) for _ in range(5)]) for chain in chains]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    found = logits(load(folder))
    assert any(torch.equal(found, logits(chain)) for chain in chains)
    used = {"README.md", "chain.json", *(entry["folder"] for entry in entries(folder).values())}
    assert set(os.listdir(folder)) == used


def test_saving_happens_inside_the_folder() -> None:
    """In a folder that cannot be renamed or removed, as a mount point cannot: its parent is not writable."""
    model = make_chain()
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)  # on the way to the folders, for the user `nobody`
        folders = {name: Path(root, "parent", name) for name in ("chain", "lora", "merged")}
        for name, place in folders.items():
            place.mkdir(parents=True)
            (place / "mine.txt").write_text(name)
        writers = {"chain": save_chain, "lora": export_lora, "merged": export_merged}
        for number in range(2):  # new, and over what is there
            for name, write in writers.items():
                if number == 0:
                    write(model, Path(root, "warm", name))  # imports what it needs, while it can
            os.chmod(Path(root, "parent"), 0o555)
            for path in [path for place in folders.values() for path in (place, *place.rglob("*"))]:
                if os.geteuid() == 0:
                    os.chown(path, 65534, 65534)

            def write_all() -> None:
                if os.geteuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                with pytest.raises(OSError):
                    Path(root, "parent", "another").mkdir()
                for name, write in writers.items():
                    write(model, folders[name])

            assert os.waitpid(in_a_process(write_all), 0)[1] == 0
        os.chmod(Path(root, "parent"), 0o755)
        same_logits(load(folders["chain"]), model)
        same_logits(PeftModel.from_pretrained(tiny("llama"), folders["lora"]).eval(), model)
        merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
        torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
        assert [(place / "mine.txt").read_text() for place in folders.values()] == list(folders)


@pytest.mark.parametrize("place", [".", ".."])
@pytest.mark.parametrize("write", [save_chain, export_lora, export_merged])
def test_into_the_working_directory_or_above(tmp_path: Path, monkeypatch: Any, place: str, write: Any) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = os.stat(".")
    for _ in range(2):
        write(make_chain(), place)
    assert Path.cwd() == tmp_path / "a" / "b" and os.path.samestat(os.stat(Path.cwd()), before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can save into a folder of somebody else")
def test_a_save_by_root_leaves_the_owners(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path)
    paths = [tmp_path, *(path for path in tmp_path.rglob("*") if path.name not in ("chain.json", "README.md"))]
    for path in paths:
        os.chown(path, 1234, 1234)
    save_chain(add(model, "fourth", **settings()), tmp_path)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in paths} == {(1234, 1234)}


def test_the_readme_says_how_to_load_the_chain(tmp_path: Path) -> None:
    """With the class of the base model, and never with a path of this machine, which the Hub refuses."""
    for architecture, kind, loader in (
        ("llama", "CAUSAL_LM", "AutoModelForCausalLM"),
        ("t5", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("t5", None, "T5ForConditionalGeneration"),
        ("bert", "SEQ_CLS", "AutoModelForSequenceClassification"),
    ):
        for base, named in (("somebody/base", True), ("t5-small", True), (str(tmp_path), False)):
            model = make_chain(architecture, {"first": {"task_type": kind}, "second": {"task_type": kind}})
            model.base_model.set_soft_coefficients({"first": 0.5}, similarities={"first": 0.5})
            for config in model.peft_config.values():
                config.base_model_name_or_path = base
            folder = save_chain(model, tmp_path / f"{architecture}-{kind}-{named}-{len(base)}")
            text = (folder / "README.md").read_text()
            assert "pip install peft-aso" in text and "KeyError: 'ASO_LORA'" in text and "first (0.50)" in text
            code = text.split("```python")[1].split("```")[0]
            assert f"from transformers import {loader}\n" in code and f'load_chain({loader}.from_pretrained("' in code
            assert (f"base_model: {base}" in text) == named == (base in text)
            assert (f'task_type="{kind}"' in code) == (kind is not None)
    save_chain(add(model, "third", **settings("bert")), folder)
    text = (folder / "README.md").read_text()
    assert "3 tasks" in text
    (folder / "README.md").write_text(re.sub("<!--.*-->", "Mine.", text))
    save_chain(add(model, "fourth", **settings("bert")), folder)
    assert "3 tasks" in (folder / "README.md").read_text() and "Mine." in (folder / "README.md").read_text()


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
