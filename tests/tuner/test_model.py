"""`ASOLoraModel`: one task in a context, psi, heads, deleting, and what is refused."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import BertForQuestionAnswering, BertForTokenClassification

from peft_aso import ASOLoraConfig, HistoryError, MissingHistoryError
from peft_aso.tuner.adapter_file import weights_hash
from peft_aso.tuner.model import tuner_of
from tests.tiny_models import tiny, tiny_batch
from tests.tuner import chains
from tests.tuner.chains import CURRENT, HISTORY, TASKS, assert_close, assert_is_sum, chain, config_for, load, logits


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", ["auto", "stacked", "folded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "gemma3"])
def test_only_through_and_folded(kind: str, form: str, fresh_seed: int):
    base, settings = tiny(kind), {"lora_bias": kind == "gpt2", "use_rslora": kind == "t5"}
    if kind in ("llama", "gemma3"):  # gemma3 scales its embeddings
        base = tiny(kind, tie_word_embeddings=False)
        settings["target_modules"] = ["embed_tokens", "q_proj", "down_proj"]
    base, model = chain(kind, base=base, seed=fresh_seed, history_form=form, **settings)
    before, trained, tuner = logits(model), flags(model), model.base_model
    heads: dict[str, Any] = {task: task if kind == "bert" else None for task in TASKS}

    def check_each_task() -> None:
        for number, task in enumerate(TASKS):
            with tuner.only(task):
                assert tuner.current_task == task and model.active_adapters == [task]
                assert_is_sum(model, base, [task], head=heads[task])
            with tuner.through(task):
                assert_is_sum(model, base, TASKS[: number + 1], head=heads[task])
                assert tuner.history == TASKS[:number] and flags(model) == trained
        assert model.active_adapters == [CURRENT]

    check_each_task()
    assert torch.equal(logits(model), before)
    with tuner.folded():
        assert_is_sum(model, base, TASKS, head=heads[CURRENT])
        check_each_task()
    with tuner.only("amazon"), tuner.folded():
        assert_is_sum(model, base, ["amazon"], head=heads["amazon"])
    assert flags(model) == trained
    assert_is_sum(model, base, TASKS, head=heads[CURRENT])


def test_contexts_nest_and_survive_exceptions():
    base, model = chain("llama", target_modules=["q_proj", "embed_tokens"])
    trained, before, tuner = flags(model), logits(model), model.base_model
    with tuner.only("amazon"):
        with tuner.through("amazon"), tuner.only("dbpedia"):
            assert_is_sum(model, base, ["dbpedia"])
        for context in (tuner.through(CURRENT), tuner.folded()):
            with pytest.raises(RuntimeError, match="stop"), context:
                raise RuntimeError("stop")
        assert_is_sum(model, base, ["amazon"])
    with pytest.raises(ValueError, match="'imdb'.*'dbpedia', 'amazon', 'agnews'"):
        tuner.only("imdb").__enter__()
    batch, names = tiny_batch(model, batch_size=3), ["dbpedia", "__base__", CURRENT]
    mixed = logits(model, batch, adapter_names=names)
    for context in (tuner.only("dbpedia"), tuner.folded()):
        with context, model.disable_adapter():
            assert torch.equal(logits(model), logits(base))
    with tuner.folded():
        assert_close(logits(model, batch, adapter_names=names), mixed)
    assert torch.equal(logits(model), before) and flags(model) == trained


def test_threads_take_turns():
    _, model = chain("llama")
    tuner, batch = model.base_model, tiny_batch(model, batch_size=3)
    contexts: list[Any] = [tuner.only, tuner.through, lambda task: tuner.folded()]
    alone = []
    for number, task in enumerate(TASKS):
        with contexts[number](task):
            alone.append(logits(model, batch))

    def run(number: int) -> torch.Tensor:
        with contexts[number](TASKS[number]):
            return logits(model, batch)

    numbers = [0, 1, 2] * 20
    with ThreadPoolExecutor(3) as pool:
        for number, found in zip(numbers, pool.map(run, numbers), strict=True):
            assert_close(found, alone[number])
    assert model.active_adapters == [CURRENT] and not tuner.tasks.fold_active
    copy.deepcopy(model).base_model.only("amazon").__enter__()  # a copy has a lock of its own
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(run, 0).result(timeout=60), alone[0])


def test_several_active_adapters_and_wrappers():
    """PEFT's way of activating several: a history that they share is there once."""
    base, model = chain("llama")
    compiled = torch.compile(model, backend="eager")
    assert all(tuner_of(each) is model.base_model for each in (model, compiled, nn.DataParallel(compiled)))
    assert tuner_of(base) is None
    model.base_model.set_adapter(["amazon", CURRENT])
    assert_is_sum(model, base, TASKS)
    with pytest.raises(ValueError, match="exactly one active task"):
        _ = model.base_model.current_task


def test_isolated_tasks_train_without_their_history_and_run_with_it():
    base, model = chain("llama", TASKS[:2])
    chains.add(model, CURRENT, config_for(forward_history="isolated"), seed=2)
    for _ in range(2):
        assert_is_sum(model.eval(), base, TASKS)
        assert_is_sum(model.train(), base, [CURRENT])
    with model.base_model.through("amazon"):
        assert_is_sum(model, base, HISTORY)  # each task has its own setting
    chains.assert_merged(copy.deepcopy(model).merge_and_unload(), chains.summed(base, model, TASKS))


def test_heads_follow_the_current_task(tmp_path: Path):
    base, model = chain("bert")
    for number, task in enumerate(TASKS):
        model.set_adapter(task)
        assert_is_sum(model, base, TASKS[: number + 1], head=task)
    trained = [name for name, trains in flags(model).items() if trains and "modules_to_save" in name]
    assert trained and all(f"classifier.modules_to_save.{CURRENT}" in name for name in trained)
    with model.disable_adapter():
        assert_close(logits(model), logits(base))
    model.set_requires_grad(list(TASKS))
    chains.assert_frozen(model, HISTORY)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, base=tiny("bert"))
    assert_is_sum(loaded, base, TASKS, head=CURRENT)
    chains.assert_frozen(loaded, HISTORY)
    expected = chains.summed(base, model, HISTORY, head="amazon")
    with pytest.warns(UserWarning, match="heads are not summed"):
        chains.assert_merged(model.merge_and_unload(adapter_names=["amazon"]), expected)


@pytest.mark.parametrize(
    ("kind", "task_type"), [(BertForTokenClassification, "TOKEN_CLS"), (BertForQuestionAnswering, "QUESTION_ANS")]
)
def test_heads_that_pefts_classes_name_by_themselves(kind: Any, task_type: str, tmp_path: Path):
    base, ids = kind(tiny("bert", num_labels=2).config).eval(), torch.arange(3, 11).reshape(2, 4)
    settings: dict[str, Any] = {"r": 2, "task_type": task_type, "target_modules": ["query", "value"]}
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(**settings), "dbpedia")
    model = get_peft_model(copy.deepcopy(base), ASOLoraConfig(**settings), "dbpedia")
    assert flags(model) == flags(stock)
    chains.fill(model, ["dbpedia"])
    chains.add(model, "amazon", ASOLoraConfig(**settings), seed=1)
    model.save_pretrained(tmp_path)
    loaded, found = load(tmp_path, TASKS[:2], base=base), []
    for task in TASKS[:2]:
        loaded.set_adapter(task), model.set_adapter(task)
        found.append(model.eval()(input_ids=ids)[0])
        assert torch.equal(loaded(input_ids=ids)[0], found[-1])
    assert not torch.allclose(*found)


def test_training_leaves_the_history_bit_for_bit():
    _, model = chain("llama", lora_dropout=0.1)
    values = chains.copy_of(model, TASKS)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.1)
    with torch.inference_mode():  # what is made and set in inference mode is used in training
        model(**tiny_batch(model))
        model.base_model.orthogonality_penalty()
        model.base_model.set_soft_coefficients(dict.fromkeys(HISTORY, torch.tensor(0.5)))
    for step in range(3):
        optimizer.zero_grad()
        loss = model(**tiny_batch(model, seed=step)).loss + model.base_model.orthogonality_penalty()
        loss.backward()
        optimizer.step()
    chains.assert_frozen(model, HISTORY, values)
    assert all(value.grad is None for task in HISTORY for value in chains.parameters_of(model, task).values())
    for name, parameter in chains.parameters_of(model, CURRENT).items():
        assert not torch.equal(parameter, values[name]), f"{name} has not learned"


def test_psi_by_the_name_of_the_task_or_the_adapter(tmp_path: Path):
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "dbpedia")  # called "default"
    loaded.load_adapter(tmp_path / "amazon", adapter_name="second")
    loaded.load_adapter(tmp_path / CURRENT, adapter_name="third")
    loaded.set_adapter("third")
    tuner, config = loaded.base_model, loaded.peft_config["third"]
    for psi in ({"dbpedia": 0.5, "second": torch.tensor(0.25)}, {"default": 0.5, "amazon": 0.25}):
        tuner.set_soft_coefficients(psi, similarities={"default": 0.5, "second": 0.75})
        assert tuner.soft_coefficients == {"default": 0.5, "second": 0.25}
        assert config.soft_coefficients == {"dbpedia": 0.5, "amazon": 0.25}, "by task in the config"
        assert config.similarities == {"dbpedia": 0.5, "amazon": 0.75}
    assert tuner.task_name("default") == "dbpedia"
    loaded.save_pretrained(tmp_path / "again", selected_adapters=["third"])
    model.delete_adapter(CURRENT)
    model.load_adapter(tmp_path / "again" / "third", adapter_name="third")
    model.set_adapter("third")
    assert model.base_model.soft_coefficients == {"dbpedia": 0.5, "amazon": 0.25}
    chains.add(model, "new", config_for())
    assert set(model.base_model.soft_coefficients.values()) == {1.0}


def test_psi_that_does_not_fit():
    _, model = chain("llama")
    good, nan, three = {"dbpedia": 0.5, "amazon": 1}, float("nan"), [1.0, 2.0, 3.0]
    wrong: tuple[dict[str, Any], ...] = ({"dbpedia": nan}, {"amazon": [1.0, 2.0]}, {"dbpedia": three}, {"imdb": 1})
    for psi in ({"dbpedia": 0.5}, {"dbpedia": [1.0, 2.0], "amazon": three}, *({**good, **each} for each in wrong)):
        with pytest.raises(ValueError, match="psi"):
            model.base_model.set_soft_coefficients(psi)
    assert model.base_model.soft_coefficients == {"dbpedia": 1.0, "amazon": 1.0}


def test_the_config_is_a_copy_and_a_second_wrapper_has_the_same_history():
    base, model = chain("llama", TASKS[:1])
    chains.add(model, "amazon", config := config_for())
    assert (config.task_name, config.history) == (None, None)
    with pytest.warns(UserWarning, match="a second time|Already found"):
        again = get_peft_model(model.get_base_model(), config, adapter_name=CURRENT)
    chains.fill(again, [CURRENT], seed=2)
    assert_is_sum(again.eval(), base, TASKS)


def test_a_task_may_be_loaded_before_its_history(tmp_path: Path):
    base, model = chain("llama")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'default' was trained on top of \['dbpedia', 'amazon'\]"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / CURRENT).eval()  # called "default"
    for call in (lambda: logits(loaded), loaded.merge_and_unload, loaded.base_model.orthogonality_penalty):
        with pytest.raises(MissingHistoryError, match="'dbpedia', 'amazon'.*load_chain"):
            call()
    with loaded.base_model.only("default"):
        assert_is_sum(loaded, base, ["default"])
    with pytest.warns(UserWarning, match=r"'second' was trained on top of \['dbpedia'\]"):
        loaded.load_adapter(tmp_path / "amazon", adapter_name="second")
    loaded.load_adapter(tmp_path / "dbpedia", adapter_name="first")
    assert loaded.base_model.history == ("first", "second")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("change", ["weights", "scale"])
@pytest.mark.parametrize("order", [TASKS[:2], TASKS[1::-1]], ids=["history first", "task first"])
def test_a_history_with_other_weights_or_another_scale_is_refused(change: str, order: Any, tmp_path: Path):
    _, model = chain("llama", TASKS[:2])
    if change == "weights":
        model.get_parameter(min(chains.parameters_of(model, "dbpedia")))[0, 0].data.add_(0.01)
    model.save_pretrained(tmp_path)
    if change == "scale":
        chains.edit_config(tmp_path / "dbpedia", lora_alpha=4)
    loaded = load(tmp_path, order[:1])
    for low in (False, True):
        with pytest.raises(ValueError, match="dbpedia"):
            loaded.load_adapter(tmp_path / order[1], adapter_name=order[1], low_cpu_mem_usage=low)
    assert list(loaded.peft_config) == [order[0]]
    assert not any(f".{order[1]}." in name for name in loaded.state_dict())
    chains.edit_config(tmp_path / "amazon", history_hashes=None)  # of an earlier version
    assert list(load(tmp_path, TASKS[:2]).peft_config) == list(TASKS[:2])


@pytest.mark.parametrize("order", [TASKS, TASKS[::-1]], ids=["oldest first", "newest first"])
def test_the_dtype_in_which_a_history_is_loaded_does_not_matter(order: tuple[str, ...], tmp_path: Path):
    """PEFT's cast to float32 makes new parameters of an embedding's matrices, and those must not train."""
    base, model = chain("llama", base=tiny("llama").bfloat16(), target_modules=["q_proj", "embed_tokens"])
    for dtype in (torch.float32, torch.bfloat16):
        settings: dict[str, Any] = {"autocast_adapter_dtype": dtype == torch.float32}
        model.save_pretrained(tmp_path)
        model = load(tmp_path, order, base=copy.deepcopy(base), **settings)
        again = copy.deepcopy(model)  # PEFT rounds what it reads over an adapter with low_cpu_mem_usage
        for low in (False, True):
            again.load_adapter(tmp_path / "dbpedia", adapter_name="dbpedia", low_cpu_mem_usage=low, **settings)
            chains.assert_frozen(again, HISTORY)
        for each in (model, again):
            assert {value.dtype for name, value in each.named_parameters() if "lora_" in name} == {dtype}


def test_hashes_are_of_float32_values_and_the_scale():
    _, model = chain("llama")
    tuner = model.base_model
    for number, task in enumerate(TASKS):
        hashes = {old: tuner.adapter_hash(old) for old in TASKS[:number]}
        assert (model.peft_config[task].history_hashes or {}) == hashes
    before = tuner.adapter_hash("dbpedia")
    model.double()
    assert tuner.adapter_hash("dbpedia") == before != tuner.adapter_hash("amazon"), "PEFT changes dtypes"
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    before = weights_hash(dict(reversed(tensors.items())))
    assert weights_hash({name: value.half() for name, value in tensors.items()}) == before
    assert weights_hash({**tensors, "b": torch.ones(1, 2)}) != before
    assert weights_hash(tensors, config_for()) != weights_hash(tensors, config_for(lora_alpha=9))


OBSTACLES: tuple[dict[str, Any], ...] = (
    {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"}, {"use_dora": True}, {"bias": "lora_only"},
    {"bias": "all"}, {"alora_invocation_tokens": [3, 4]}, {"trainable_token_indices": [3, 4]}, {"kasa_config": {}},
    {"target_parameters": ["mlp.down_proj.weight"], "target_modules": []}, {"velora_config": {"num_groups": 2}},
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_sum_is_refused_in_a_chain():
    _, model = chain("llama")
    before = chains.state_of(model)
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"x": 4}}
    for settings in (*OBSTACLES, loftq, {"init_lora_weights": "corda", "corda_config": {}}):
        with pytest.raises(HistoryError, match="'imdb'"):
            model.add_adapter("imdb", config_for(**settings))
    for settings in OBSTACLES:
        alone = get_peft_model(tiny("llama"), config_for(**settings), adapter_name="alone")
        with pytest.raises(HistoryError, match="'alone'|'next'"):
            alone.add_adapter("next", config_for())
        assert list(alone.peft_config) == ["alone"]
    chains.assert_same(model, before)


def test_attention_modules_cannot_carry_a_history():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    model = get_peft_model(base, ASOLoraConfig(r=2, target_modules=["attention", "out"]), adapter_name="one")
    before = list(model.state_dict())
    for targets in (["attention", "out"], ["out"]):
        with pytest.raises(HistoryError, match="attention.*history=\\[\\]"):
            model.add_adapter("two", ASOLoraConfig(r=2, target_modules=targets))
        assert list(model.state_dict()) == before


def test_an_addition_that_fails_leaves_the_model_as_it_was():
    """Most layers have the adapter already when PEFT comes to the one with a rank of 0."""
    _, model = chain("llama", target_modules=["q_proj"])
    base, before = tiny("llama"), chains.state_of(model)
    types, names = [type(each) for each in model.modules()], [name for name, _ in base.named_modules()]
    settings = {"rank_pattern": {"layers.2.mlp.down_proj": 0}, "target_modules": ["q_proj", "down_proj"]}
    for more in ({}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match="`r` should be a positive integer"):
            model.add_adapter("imdb", config_for(**settings, **more))
        with pytest.raises(ValueError, match="`r` should be a positive integer"):
            get_peft_model(base, config_for(**settings, **more))
    assert [type(each) for each in model.modules()] == types, "no wrapper stays behind"
    chains.assert_same(model, before)
    assert [name for name, _ in base.named_modules()] == names and all(flags(base).values())


def test_calls_that_cannot_have_a_history(tmp_path: Path):
    """inject_adapter_in_model returns the bare base model, and the history lives in the tuner."""
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    before = chains.state_of(model)
    calls: dict[str, Any] = {
        "shared state": lambda: inject_adapter_in_model(config_for(), tiny("llama")),
        "the `PeftMixedModel`": lambda: get_peft_model(tiny("llama"), config_for(), mixed=True),
        "different peft types": lambda: model.add_adapter("stock", LoraConfig(target_modules=["q_proj"])),
        "Hotswapping only supports": lambda: hotswap_adapter(model, tmp_path / "amazon", adapter_name=CURRENT),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    chains.assert_same(model, before)


def test_deleting_from_the_end():
    base, model = chain("llama")
    before = chains.state_of(model)
    with pytest.raises(HistoryError, match="'dbpedia'.*'amazon', 'agnews'"):
        model.delete_adapter("dbpedia")
    chains.assert_same(model, before)
    inactive = copy.deepcopy(model)
    inactive.set_adapter("amazon", inference_mode=True)
    inactive.delete_adapter(CURRENT)
    assert inactive.active_adapters == ["amazon"] and not any(flags(inactive).values())
    assert_is_sum(inactive, base, HISTORY)
    for count, task in ((2, "amazon"), (1, "dbpedia")):
        with pytest.warns(UserWarning, match=f"{task!r} is active now"):
            model.delete_adapter(TASKS[count])
        assert model.active_adapters == [task] == [model.active_adapter]
        assert_is_sum(model, base, TASKS[:count])
        assert [name for name, trains in flags(model).items() if trains] == list(chains.parameters_of(model, task))


@pytest.mark.parametrize("settings", [{"train_a": False}, {"init_lora_weights": "mica"}], ids=str)
def test_a_matrix_that_is_fixed_never_trains(settings: dict[str, Any], tmp_path: Path):
    """MiCA trains one of its two matrices too. As history both are frozen, and one alone trains again afterwards."""
    _, model = chain("llama", TASKS[:1], **settings)
    trained = flags(model)
    assert {trained[name] for name in chains.parameters_of(model, "dbpedia")} == {False, True}
    model.save_pretrained(tmp_path)
    assert flags(load(tmp_path, TASKS[:1])) == trained
    model.set_requires_grad("dbpedia")
    chains.add(model, "amazon", config_for())
    chains.assert_frozen(model, ["dbpedia"])
    with pytest.warns(UserWarning, match="is active now"):
        model.delete_adapter("amazon")
    with model.disable_adapter():
        pass
    assert flags(model) == trained
