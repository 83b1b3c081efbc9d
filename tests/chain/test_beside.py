"""A folder that holds more than the chain that was saved last: nothing is lost, and that chain is what loads."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso import load_chain, remove_task
from peft_aso.chain import ChainError, save_chain
from peft_aso.chain.manifest import MANIFEST_NAME
from tests.chain.chains import logits, make_chain, randomize, stock_adapter
from tests.tiny_models import tiny


def chain_of(*tasks: str, seed: int = 0) -> Any:
    return make_chain(tasks={task: {} for task in tasks}, seed=seed)


def quietly(folder: Any, **options: Any) -> Any:
    """Load, and see that nothing was left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")
        return load_chain(tiny("llama"), folder, **options)


def leaving_out(folder: Path, *names: str) -> Any:
    """Load, and see that one warning names just these."""
    with pytest.warns(UserWarning, match="left out.*list of all adapter folders") as caught:
        model = load_chain(tiny("llama"), folder)
    (message,) = [str(each.message) for each in caught if "left out" in str(each.message)]
    assert f"holds {', '.join(map(repr, names))} beside" in message
    return model


def check_loads(loaded: Any, saved: Any) -> None:
    assert list(loaded.peft_config) == list(saved.peft_config)
    assert loaded.active_adapters == saved.active_adapters
    assert torch.equal(logits(loaded), logits(saved))


def left_out(folder: Path) -> dict[str, Any]:
    listing = json.loads((folder / MANIFEST_NAME).read_text())
    return {each["folder"]: each["sha256"] for each in listing["left_out"]}


def test_another_chain_in_the_folder(tmp_path: Path) -> None:
    old, new = chain_of("x", "y"), chain_of("sst", "topic", seed=1)
    save_chain(old, tmp_path)
    listed = json.loads((tmp_path / MANIFEST_NAME).read_text())["tasks"]
    save_chain(new, tmp_path)
    assert left_out(tmp_path) == {entry["task"]: entry["sha256"] for entry in listed}
    check_loads(leaving_out(tmp_path, "x", "y"), new)
    check_loads(quietly([tmp_path / "x", tmp_path / "y"]), old)
    assert list(quietly(tmp_path, tasks=["sst"]).peft_config) == ["sst"]
    with pytest.warns(UserWarning, match="holds 'y' beside"), pytest.raises(ChainError, match="no task 'y' here"):
        load_chain(tiny("llama"), tmp_path, tasks=["y"])
    save_chain(old, tmp_path)
    check_loads(leaving_out(tmp_path, "sst", "topic"), old)


def test_a_task_on_top_of_weights_that_are_gone(tmp_path: Path) -> None:
    old, new = chain_of("x", "y", "z"), chain_of("x", "y")
    randomize(new, "y")
    save_chain(old, tmp_path)
    save_chain(new, tmp_path)
    check_loads(leaving_out(tmp_path, "z"), new)
    save_chain(new, tmp_path)
    check_loads(leaving_out(tmp_path, "z"), new)  # and stays so
    assert (tmp_path / "z" / SAFETENSORS_WEIGHTS_NAME).exists()


def test_tasks_on_top_of_what_is_saved_stay(tmp_path: Path) -> None:
    model = chain_of("x", "y", "z")
    save_chain(model, tmp_path)
    listed = json.loads((tmp_path / MANIFEST_NAME).read_text())
    for tasks in (["x"], ["x", "y"]):
        save_chain(model, tmp_path, tasks=tasks)
        assert json.loads((tmp_path / MANIFEST_NAME).read_text()) == listed
        check_loads(quietly(tmp_path), model)


def test_what_was_saved_last_is_active_beside_a_branch_that_stays(tmp_path: Path) -> None:
    model = chain_of("x", "y", "z")
    save_chain(model, tmp_path)
    remove_task(model, "z")
    model.add_adapter("branch", type(model.peft_config["y"])(r=2, target_modules=["q_proj"], history=["x"]))
    randomize(model, "branch")
    model.set_adapter("branch")
    save_chain(model.eval(), tmp_path, tasks=["x", "branch"])
    loaded = quietly(tmp_path)
    assert list(loaded.peft_config) == ["x", "y", "branch"], "z is gone on purpose, y is not"
    assert loaded.base_model.history == ("x",)
    assert torch.equal(logits(loaded), logits(model))


def test_a_task_that_was_changed_by_hand_is_left_out(tmp_path: Path) -> None:
    model = chain_of("x", "y")
    save_chain(model, tmp_path)
    path = tmp_path / "y" / SAFETENSORS_WEIGHTS_NAME
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    save_chain(model, tmp_path, tasks=["x"])
    assert list(leaving_out(tmp_path, "y").peft_config) == ["x"]


def test_what_peft_writes_later_is_let_in(tmp_path: Path) -> None:
    save_chain(chain_of("x"), tmp_path)
    new = chain_of("sst", seed=1)
    save_chain(new, tmp_path)
    chain_of("x").save_pretrained(str(tmp_path))  # the same weights again
    check_loads(leaving_out(tmp_path, "x"), new)
    more = make_chain(tasks={"sst": {}, "x": {}}, seed=1)
    more.save_pretrained(str(tmp_path), selected_adapters=["x"])
    check_loads(quietly(tmp_path), more)


def test_nothing_that_lies_there_keeps_a_chain_from_being_saved(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    save_chain(chain_of("config", "data", "gone", "renamed"), folder)
    stock_adapter(folder / "plain")
    (folder / "config" / CONFIG_NAME).write_text("{")
    (folder / "data" / SAFETENSORS_WEIGHTS_NAME).write_bytes(b"broken")
    (folder / "gone").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "gone")
    shutil.copytree(folder / "renamed", folder / "x")
    for text in ((folder / MANIFEST_NAME).read_text(), "{", '{"format": "another"}'):
        (folder / MANIFEST_NAME).write_text(text)
        new = chain_of("sst", seed=1)
        save_chain(new, folder)
        unreadable = {"config": None, "data": None, "gone": None}
        assert {name: digest for name, digest in left_out(folder).items() if digest is None} == unreadable
        check_loads(leaving_out(folder, "config", "data", "gone", "plain", "renamed", "x"), new)
    assert (folder / "data" / SAFETENSORS_WEIGHTS_NAME).read_bytes() == b"broken"


def test_a_listing_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    model = chain_of("x")
    save_chain(model, tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.warns(UserWarning, match="is not known any more.*damaged"):
        save_chain(model, tmp_path)
    check_loads(quietly(tmp_path), model)


def test_an_older_listing(tmp_path: Path) -> None:
    model = chain_of("x", "y")
    save_chain(model, tmp_path)
    listing = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del listing["left_out"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(listing))
    check_loads(quietly(tmp_path), model)
    new = chain_of("sst", seed=1)
    save_chain(new, tmp_path)
    check_loads(leaving_out(tmp_path, "x", "y"), new)


def test_a_chain_of_which_nothing_is_there(tmp_path: Path) -> None:
    save_chain(chain_of("x"), tmp_path)
    save_chain(chain_of("sst", seed=1), tmp_path)
    shutil.rmtree(tmp_path / "sst")
    with pytest.raises(ChainError, match="lists the task 'sst'.*not there"):
        load_chain(tiny("llama"), tmp_path)
    with pytest.raises(ChainError, match="no task to load"):
        load_chain(tiny("llama"), tmp_path, strict=False)
