"""save_chain writes all or nothing, and its manifest finds what was changed afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso import load_chain
from peft_aso.chain import ChainError, export_lora, save_chain, saving
from peft_aso.chain.manifest import MANIFEST_NAME, weights_hash
from tests.chain.chains import killed_in_a_child, logits, make_chain, settings
from tests.tiny_models import tiny


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST_NAME).read_text())


def test_what_is_written(tmp_path: Path) -> None:
    model = make_chain()
    model.base_model.set_soft_coefficients({"first": 0.25, "second": 0.5}, similarities={"first": 0.75, "second": 0.5})
    folder = save_chain(model, tmp_path / "chain")
    assert folder == tmp_path / "chain"
    assert sorted(os.listdir(folder)) == ["README.md", MANIFEST_NAME, "first", "second", "third"]
    written = manifest(folder)
    assert (written["format"], written["format_version"]) == ("peft_aso chain", 1)
    entries = written["tasks"]
    assert [entry["task"] for entry in entries] == ["first", "second", "third"]
    assert [entry["history"] for entry in entries] == [[], ["first"], ["first", "second"]]
    assert [entry["folder"] for entry in entries] == ["first", "second", "third"]
    assert {entry["rank"] for entry in entries} == {2}
    assert entries[2]["soft_coefficients"] == {"first": 0.25, "second": 0.5}
    assert entries[2]["similarities"] == {"first": 0.75, "second": 0.5}
    for entry in entries:
        weights = load_file(folder / entry["folder"] / SAFETENSORS_WEIGHTS_NAME)
        assert entry["sha256"] == weights_hash(weights)


def test_default_adapter_gets_its_tasks_folder(tmp_path: Path) -> None:
    model = make_chain(tasks={"default": {"task_name": "reviews"}, "second": {}})
    save_chain(model, tmp_path)
    assert not (tmp_path / CONFIG_NAME).exists()
    assert (tmp_path / "reviews" / SAFETENSORS_WEIGHTS_NAME).exists()
    assert torch.equal(logits(load_chain(tiny("llama"), tmp_path)), logits(model))


def test_chosen_tasks(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path / "two", tasks=["second", "first"])
    assert [entry["task"] for entry in manifest(tmp_path / "two")["tasks"]] == ["first", "second"]
    with pytest.raises(ChainError, match="'third' was trained on top of 'first', which would not be"):
        save_chain(model, tmp_path / "three", tasks=["third", "second"])
    with pytest.raises(ChainError, match="no task 'fourth' in the model. There are: 'first'"):
        save_chain(model, tmp_path / "three", tasks=["fourth"])
    with pytest.raises(ChainError, match="named twice"):
        save_chain(model, tmp_path / "three", tasks=["first", "first"])
    with pytest.raises(ChainError, match="no task to save"):
        save_chain(model, tmp_path / "three", tasks=[])
    assert not (tmp_path / "three").exists()


def test_combined_adapters_are_no_tasks(tmp_path: Path) -> None:
    model = make_chain()
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mix", combination_type="cat")
    save_chain(model, tmp_path)
    assert not (tmp_path / "mix").exists()


def test_only_our_models(tmp_path: Path) -> None:
    for model in (tiny("llama"), get_peft_model(tiny("llama"), LoraConfig(**settings("llama")))):
        with pytest.raises(ChainError, match="save_chain needs a PeftModel with ASO_LORA"):
            save_chain(model, tmp_path / "chain")


def test_not_into_an_adapters_folder(tmp_path: Path) -> None:
    make_chain(tasks={"default": {}}).save_pretrained(str(tmp_path))
    before = content(tmp_path)
    with pytest.raises(ChainError, match="itself the folder of an adapter"):
        save_chain(make_chain(), tmp_path)
    assert content(tmp_path) == before


def test_saving_again_keeps_other_files(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert "peft" in (tmp_path / "README.md").read_text()  # PEFT's card, for somebody to write in
    (tmp_path / "README.md").write_text("# Mine")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".third." in name:
                parameter.add_(1.0)
    save_chain(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "# Mine"
    assert torch.equal(logits(load_chain(tiny("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "name",
    ["sst2/v1", ".x", "a\\b", "a\0b", "a.b", "model", "layers", "weight", "lora_A", "first", "a b", "ä", "a-b:c"],
)
def test_a_name_that_is_saved_is_one_that_loads(tmp_path: Path, name: str) -> None:
    """Whatever the tuner takes: it is saved and can be loaded, or is refused before anything is written."""
    model = make_chain(tasks={"default": {}, "second": {}})
    model.peft_config["default"].task_name = name
    model.peft_config["second"].history = [name]
    model.base_model.tasks.refresh(model.peft_config)
    is_good = name in ("first", "a b", "ä", "a-b:c")
    try:
        save_chain(model, tmp_path / "chain")
    except ChainError as error:
        assert not is_good and repr(name) in str(error) and not (tmp_path / "chain").exists()
    else:
        assert is_good
        assert torch.equal(logits(load_chain(tiny("llama"), tmp_path / "chain")), logits(model))


def test_names_of_other_adapters_are_no_parts_of_the_model(tmp_path: Path) -> None:
    model = make_chain("bert")  # whose heads have the adapters' names in their parameters' names
    assert list(load_chain(tiny("bert"), save_chain(model, tmp_path / "chain")).peft_config) == list(model.peft_config)


def test_a_task_that_is_called_as_an_export_was(tmp_path: Path) -> None:
    save_chain(make_chain(), tmp_path)
    export_lora(make_chain(), tmp_path / "sum")
    listing = {**manifest(tmp_path), "exports": ["sum"]}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(listing))
    save_chain(make_chain(), tmp_path)
    assert manifest(tmp_path)["exports"] == ["sum"] and manifest(tmp_path)["left_out"] == []
    model = make_chain(tasks={"sum": {}})
    save_chain(model, tmp_path)
    assert manifest(tmp_path)["exports"] == []
    assert list(load_chain(tiny("llama"), tmp_path).peft_config) == ["sum"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_disk_full_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    folder = save_chain(make_chain(seed=1), tmp_path / "chain")
    before, expected = content(folder), logits(load_chain(tiny("llama"), folder))
    write, calls = saving._write_adapter, []

    def full(model: Any, adapter: str, stage: Path, task: str) -> None:
        calls.append(adapter)
        if len(calls) == call:
            (stage / task).mkdir()
            (stage / task / CONFIG_NAME).write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(model, adapter, stage, task)

    monkeypatch.setattr(saving, "_write_adapter", full)
    with pytest.raises(OSError, match="No space left"):
        save_chain(make_chain(seed=2), folder)
    assert content(folder) == before
    assert os.listdir(tmp_path) == ["chain"]
    assert torch.equal(logits(load_chain(tiny("llama"), folder)), expected)


def test_killed_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_chain(make_chain(seed=1), tmp_path / "chain")
    before, expected = content(folder), logits(load_chain(tiny("llama"), folder))
    monkeypatch.setattr(saving, "write_manifest", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    model = make_chain(seed=2)
    killed_in_a_child(lambda: save_chain(model, folder))
    assert content(folder) == before
    assert torch.equal(logits(load_chain(tiny("llama"), folder)), expected)


# ---- the manifest as a cross-check when loading ----------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chain(make_chain(), tmp_path_factory.mktemp("saved") / "chain")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "chain"))


def check_strict(folder: Path, message: str, tasks: list[str] | None = None) -> Any:
    with pytest.raises(ChainError, match=message):
        load_chain(tiny("llama"), folder, tasks=tasks)
    with pytest.warns(UserWarning, match=message):
        return load_chain(tiny("llama"), folder, tasks=tasks, strict=False)


def test_changed_weights(folder: Path) -> None:
    path = folder / "second" / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    old = weights_hash(weights)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path)
    check_strict(folder, f"'second'.* sha256 {weights_hash(weights)} here, {old} in chain.json")


def test_same_values_in_another_dtype_are_not_changed(tmp_path: Path) -> None:
    model = make_chain().to(torch.bfloat16)
    save_chain(model, tmp_path)
    path = tmp_path / "second" / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    save_file({name: tensor.float() for name, tensor in weights.items()}, path)
    load_chain(tiny("llama"), tmp_path)


def test_missing_task(folder: Path) -> None:
    shutil.rmtree(folder / "third")
    model = check_strict(folder, "lists the task 'third' .*not there.*strict=False")
    assert model.active_adapters == ["second"]


def test_changed_history(folder: Path) -> None:
    path = folder / "third" / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "history": ["first"]}))
    model = check_strict(folder, r"history of 'third' is \['first'\] .* and \['first', 'second'\]")
    assert model.base_model.tasks.histories["third"] == ("first",)


def test_later_adapters_need_not_be_listed(folder: Path) -> None:
    model = make_chain(tasks={"first": {}, "second": {}, "third": {}, "fourth": {}})
    model.save_pretrained(str(folder), selected_adapters=["fourth"])
    assert load_chain(tiny("llama"), folder).active_adapters == ["fourth"]


def test_order_of_unrelated_tasks_is_the_manifests(tmp_path: Path) -> None:
    model = make_chain(tasks={"zebra": {}, "apple": {"history": []}})
    save_chain(model, tmp_path)
    assert list(load_chain(tiny("llama"), tmp_path).peft_config) == ["zebra", "apple"]


def test_changed_scale(folder: Path) -> None:
    path = folder / "second" / CONFIG_NAME
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "lora_alpha": 800}))
    check_strict(folder, "'second'.*another scale.*'lora_alpha': 800.*restore the file")
    path.write_text(json.dumps({**values, "use_rslora": True}))
    check_strict(folder, "'second'.*another scale.*'use_rslora': True")
    path.write_text(json.dumps(values))
    listing = json.loads((folder / MANIFEST_NAME).read_text())
    for entry in listing["tasks"]:
        del entry["scale"]  # as earlier versions wrote it
    (folder / MANIFEST_NAME).write_text(json.dumps(listing))
    load_chain(tiny("llama"), folder)
