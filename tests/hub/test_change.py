"""A task is taken out again, or exchanged for a newer version: in the model, on disk and on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_aso import ChainError, load_chain, push_chain, remove_task, save_chain, update_task
from tests.chain.chains import make_chain, randomize
from tests.hub.server import Hub
from tests.hub.test_push_and_load import base, extended, logits, same
from tests.tiny_models import tiny


def test_without_a_task_the_model_is_the_sum_of_the_others(tmp_path: Path) -> None:
    model = make_chain()
    model.peft_config["third"].similarities = {"first": 0.5, "second": 0.25}
    save_chain(model, tmp_path / "chain")
    before = logits(model)
    remove_task(model, "second")
    assert model.base_model.history == ("first",) and model.peft_config["third"].similarities == {"first": 0.5}
    torch.manual_seed(0)
    expected = tiny("llama").eval()
    with torch.no_grad():
        for name, layer in model.base_model.lora_layers().items():
            for task in ("first", "third"):
                delta = layer.lora_B[task].weight @ layer.lora_A[task].weight
                expected.get_submodule(name).weight += layer.scaling[task] * delta
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, logits(model))
    save_chain(model, tmp_path / "chain")
    assert not (tmp_path / "chain" / "second").exists()
    same(load_chain(base(), tmp_path / "chain"), model)


def test_the_active_task_can_go(tmp_path: Path) -> None:
    model = make_chain()
    with pytest.warns(UserWarning, match="'second' is active now"):
        remove_task(model, "third")
    assert model.base_model.current_task == "second"
    remove_task(model, "first")
    with pytest.raises(ChainError, match="only task"):
        remove_task(model, "second")
    with pytest.raises(ChainError, match="no task 'first'"):
        remove_task(model, "first")
    with pytest.raises(ChainError, match="needs a PeftModel"):
        remove_task(tiny("llama"), "first")
    other = make_chain()
    save_chain(other, tmp_path)
    save_chain(model, tmp_path / "second only")
    save_chain(other, tmp_path, tasks=["first"])
    assert (tmp_path / "second").exists(), "a task that was not removed stays on disk"


def test_a_removed_task_goes_from_the_hub_and_only_then(hub: Hub) -> None:
    model = make_chain()
    push_chain(model, "user/chain")
    shorter = load_chain(base(), "user/chain", tasks=["second"])
    with pytest.raises(ChainError, match="has 'third', which this model has not"):
        push_chain(shorter, "user/chain")
    remove_task(model, "second")
    push_chain(model, "user/chain")
    assert not any(path.startswith("second/") for path in hub.files("user/chain"))
    assert [task["task"] for task in json.loads(hub.files("user/chain")["chain.json"])["tasks"]] == ["first", "third"]
    same(load_chain(base(), "user/chain"), model)


def test_a_task_is_updated_to_a_new_revision(hub: Hub) -> None:
    push_chain(make_chain(), "user/chain")
    newer = load_chain(base(), "user/chain", trainable=True)
    old = newer.peft_config["first"].origin
    randomize(newer, "second")
    with pytest.raises(ChainError, match="other weights for 'second'"):
        push_chain(newer, "user/chain")
    push_chain(newer, "user/newer")
    model = extended(load_chain(base(), "user/chain"), "fourth")
    logits(model)  # the history has been in use
    update_task(model, "second", "user/newer")
    assert model.peft_config["second"].origin["repo_id"] == "user/newer" and old["repo_id"] == "user/chain"
    for layer, other in zip(
        model.base_model.lora_layers().values(), newer.base_model.lora_layers().values(), strict=True
    ):
        assert torch.equal(layer.lora_A["second"].weight, other.lora_A["second"].weight)
    push_chain(model, "user/chain")
    same(load_chain(base(), "user/chain"), model)
    update_task(model, "second", "user/chain", revision=old["revision"])
    same(model, extended_like(model))


def extended_like(model: object) -> object:
    """The chain as it was first, with the fourth task of `model`."""
    found = extended(load_chain(base(), "user/chain"), "fifth")
    remove_task(found, "fifth")
    update_task(found, "second", "user/chain", revision=model.peft_config["second"].origin["revision"])  # type: ignore[attr-defined]
    return found


def test_an_update_that_does_not_fit_changes_nothing(hub: Hub) -> None:
    push_chain(make_chain(tasks={"first": {"r": 3}, "second": {}}), "user/other")
    model = make_chain()
    before = logits(model)
    with pytest.raises(ChainError, match="r 3, not 2"):
        update_task(model, "first", "user/other")
    with pytest.raises(ChainError, match="no task 'third' here"):
        update_task(model, "third", "user/other")
    assert torch.equal(logits(model), before)
