"""Looking at one task in a context, isolated training, heads, and merging (Eq. 2, Eq. 3)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import TASKS, assert_frozen, assert_is_sum, chain, config_for, fill, logits, summed

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def _flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


# ---- only, through -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_only_and_through(kind: str):
    base, model = chain(kind)
    flags, before = _flags(model), logits(model)
    heads = dict.fromkeys(TASKS) if kind != "bert" else {task: task for task in TASKS}
    for number, task in enumerate(TASKS):
        with model.base_model.only(task):
            assert model.base_model.current_task == task and model.active_adapters == [task]
            assert_is_sum(model, base, [task], head=heads[task])
            assert _flags(model) == flags
        with model.base_model.through(task):
            assert_is_sum(model, base, TASKS[: number + 1], head=heads[task])
            assert _flags(model) == flags
        assert model.active_adapters == [CURRENT] and torch.equal(logits(model), before)
    assert _flags(model) == flags


def test_they_nest_and_survive_exceptions():
    base, model = chain("llama")
    flags, before = _flags(model), logits(model)
    tuner = model.base_model
    with tuner.only("amazon"):
        with tuner.through("amazon"):
            assert_is_sum(model, base, HISTORY)
            with tuner.only("dbpedia"):
                assert_is_sum(model, base, ["dbpedia"])
            assert_is_sum(model, base, HISTORY)
        assert_is_sum(model, base, ["amazon"])
        with pytest.raises(RuntimeError, match="stop"), tuner.through(CURRENT):
            raise RuntimeError("stop")
        assert_is_sum(model, base, ["amazon"])
    with pytest.raises(ValueError, match="no adapter 'imdb'.*'dbpedia', 'amazon', 'agnews'"):
        tuner.only("imdb").__enter__()
    assert torch.equal(logits(model), before) and _flags(model) == flags and not tuner.tasks.alone


def test_gradients_still_flow_to_the_current_task_in_the_context():
    _, model = chain("llama")
    with model.base_model.only(CURRENT):
        model(**tiny_batch(model)).loss.backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert grads and all(f".{CURRENT}." in name for name in grads)


def test_merged_models_cannot_be_looked_into():
    _, model = chain("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights. Call model.unmerge_adapter"):
        model.base_model.only("dbpedia").__enter__()


def test_disabled_adapters_stay_disabled_in_the_context():
    base, model = chain("llama")
    with model.disable_adapter(), model.base_model.only("dbpedia"):
        torch.testing.assert_close(logits(model), logits(base))


def test_current_task_and_history():
    _, model = chain("llama")
    assert model.base_model.current_task == CURRENT and model.base_model.history == HISTORY
    model.base_model.set_adapter(list(HISTORY))
    with pytest.raises(ValueError, match="exactly one active task.*Call set_adapter"):
        _ = model.base_model.current_task


def test_two_active_tasks_are_summed_once_each():
    """PEFT's way of activating several; a history that they share is there once."""
    base, model = chain("llama")
    model.base_model.set_adapter(["amazon", CURRENT])
    assert_is_sum(model, base, TASKS)
    assert_frozen(model, HISTORY)


# ---- isolated ----------------------------------------------------------------------------------------------


def test_isolated_tasks_train_without_their_history_and_run_with_it():
    base, model = chain("llama", forward_history="isolated")
    assert_is_sum(model.eval(), base, TASKS)
    assert_is_sum(model.train(), base, [CURRENT])
    model.eval()
    expected = summed(base, model, TASKS)
    merged = model.train().merge_and_unload()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


def test_each_task_has_its_own_setting():
    base = tiny("llama")
    base, model = chain("llama", TASKS[:2], base=base)
    model.add_adapter(CURRENT, config_for("llama", forward_history="isolated"))
    fill(model, TASKS)
    model.train()
    assert_is_sum(model, base, HISTORY)  # amazon, stacked, is active
    model.set_adapter(CURRENT)
    assert_is_sum(model, base, [CURRENT])


# ---- heads -------------------------------------------------------------------------------------------------


def test_heads_follow_the_current_task(tmp_path: Path):
    base, model = chain("bert")
    for number, task in enumerate(TASKS):
        model.set_adapter(task)
        assert_is_sum(model, base, TASKS[: number + 1], head=task)
    assert_frozen(model, HISTORY)
    trained = {name for name, flag in _flags(model).items() if flag}
    assert any("classifier.modules_to_save.agnews" in name for name in trained)
    assert not any("modules_to_save" in name and ".agnews." not in name for name in trained)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base))
    assert_frozen(model, HISTORY)
    model.set_requires_grad(list(TASKS))
    assert_frozen(model, HISTORY)
    model.set_adapter("amazon")  # active, and history all the same
    with model.disable_adapter():
        pass
    assert_frozen(model, HISTORY)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / TASKS[0], adapter_name=TASKS[0])
    for task in TASKS[1:]:
        loaded.load_adapter(tmp_path / task, adapter_name=task)
    loaded.set_adapter(CURRENT)
    assert_is_sum(loaded.eval(), base, TASKS, head=CURRENT)
    assert_frozen(loaded, HISTORY)


@pytest.mark.parametrize("names", [None, [CURRENT], ["amazon"]])
def test_merging_keeps_the_task_s_own_head_and_says_so(names: list[str] | None):
    base, model = chain("bert")
    head = (names or [CURRENT])[0]
    expected = summed(base, model, TASKS[: TASKS.index(head) + 1], head=head)
    with pytest.warns(UserWarning, match=r"modules_to_save of \['dbpedia'.*heads are not summed"):
        merged = model.merge_and_unload(adapter_names=names)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


def test_merging_alone_keeps_the_head():
    base, model = chain("bert")
    expected = summed(base, model, ["amazon"], head="amazon")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with model.base_model.only("amazon"):
            merged = model.merge_and_unload()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_task_without_a_head_uses_the_base_model_s():
    base, model = chain("llama", TASKS[:2])
    model.add_adapter(CURRENT, config_for("llama", modules_to_save=["lm_head"]))
    fill(model, [CURRENT])
    assert_is_sum(model, base, HISTORY)
    with model.base_model.through(CURRENT):
        assert_is_sum(model, base, TASKS, head=CURRENT)
    model.set_adapter(CURRENT)
    with model.base_model.only("amazon"):
        assert_is_sum(model, base, ["amazon"])
    expected = logits(summed(base, model, HISTORY))
    merged = model.merge_and_unload(adapter_names=["amazon"])
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


# ---- merging (Eq. 3) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2", "bert"])
def test_merging_is_equation_3(kind: str):
    base, model = chain(kind, use_rslora=kind == "t5", lora_bias=kind == "gpt2")
    head = CURRENT if kind == "bert" else None
    expected, before = summed(base, model, TASKS, head), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_inside_only_just_that_adapter_is_merged():
    base, model = chain("llama")
    expected = summed(base, model, ["amazon"])
    with model.base_model.only("amazon"):
        merged = model.merge_and_unload()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


def test_merging_several_tasks_merges_each_history_once():
    base, model = chain("llama")
    expected = summed(base, model, TASKS)
    merged = model.merge_and_unload(adapter_names=["amazon", CURRENT])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_bad_names_to_merge(method: str):
    base, model = chain("llama")
    with pytest.raises(ValueError, match="no adapter 'imdb'"):
        getattr(model, method)(adapter_names=["imdb"])
    with pytest.raises(TypeError, match=r"adapter_names='amazon': give a list"):
        getattr(model, method)(adapter_names="amazon")
    assert_is_sum(model, base, TASKS)


def test_a_merged_model_is_not_given_its_history_twice():
    base, model = chain("llama")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(summed(base, model, TASKS)), rtol=1e-4, atol=1e-4)
    assert model.active_adapters == [CURRENT]
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("amazon")
    torch.testing.assert_close(logits(model), logits(summed(base, model, HISTORY)), rtol=1e-3, atol=1e-3)


def test_a_broken_adapter_is_found_by_a_safe_merge():
    base, model = chain("llama")
    layer = next(iter(model.base_model.lora_layers().values()))
    with torch.no_grad():
        layer.lora_A["dbpedia"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter dbpedia seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert model.active_adapters == [CURRENT] and layer.active_adapters == [CURRENT]
