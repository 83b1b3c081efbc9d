"""The calls of PEFT's API on a chain, compared with the same calls on stock LoRA with the same weights.

With a history: stock LoRA with all adapters active, which computes the same sum. Without one (`history=[]`): stock
LoRA, bit for bit (`make test-peft` runs PEFT's own tests on it).
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.tiny_models import tiny, tiny_batch
from tests.tuner import chains
from tests.tuner.chains import CURRENT, HISTORY, TASKS, assert_close, assert_merged, chain, config_for, logits, summed


def lora_config(kind: str = "llama", **settings: Any) -> LoraConfig:
    """The stock config with the same settings."""
    config = config_for(kind, **settings)
    return LoraConfig(**{each.name: getattr(config, each.name) for each in fields(LoraConfig) if each.init})


@dataclass
class Side:
    """One of the two models that a call is run on; in the stock one, a task is active together with all before it."""

    model: Any
    stock: bool
    path: Path

    def activate(self, task: str, **more: Any) -> Any:
        if self.stock:
            self.model.base_model.set_adapter(list(TASKS[: TASKS.index(task) + 1]), **more)
        else:
            self.model.set_adapter(task, **more)
        return self.model


def _disabled(side: Side) -> list[torch.Tensor]:
    with side.model.disable_adapter():
        return [logits(side.model), logits(copy.deepcopy(side.model).unload())]


def _loaded(side: Side, order: tuple[str, ...] = TASKS, **settings: Any) -> list[torch.Tensor]:
    side.model.save_pretrained(side.path)
    side.model = chains.load(side.path, order, **settings)
    return [logits(side.activate(CURRENT))]


CALLS: dict[str, Callable[[Side], list[torch.Tensor] | None]] = {
    "set_adapter": lambda side: [logits(side.activate(task)) for task in (*TASKS, TASKS[0], CURRENT)],
    "set_adapter(inference_mode=True)": lambda side: [logits(side.activate(CURRENT, inference_mode=True))],
    "disable_adapter, unload": _disabled,
    "set_requires_grad": lambda side: side.model.set_requires_grad(list(TASKS), requires_grad=True),
    "save_pretrained, from_pretrained, load_adapter": _loaded,
    "load_adapter(low_cpu_mem_usage=True)": lambda side: _loaded(side, low_cpu_mem_usage=True),
    "load_adapter, newest first": lambda side: _loaded(side, TASKS[::-1], is_trainable=True),
    "pickle": lambda side: setattr(side, "model", pickle.loads(pickle.dumps(side.model))),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_call_does_what_it_does_with_stock_lora(call: str, tmp_path: Path, fresh_seed: int):
    _, model = chain("llama", seed=fresh_seed)
    other = get_peft_model(tiny("llama"), lora_config(), adapter_name=TASKS[0])
    for task in TASKS[1:]:
        other.add_adapter(task, lora_config())
    other.load_state_dict(model.state_dict())
    ours, stock = Side(model, False, tmp_path / "ours"), Side(other.eval(), True, tmp_path / "stock")
    stock.activate(CURRENT)
    values = chains.copy_of(model, HISTORY)
    logits(model)  # what is computed once is there before the call

    found, expected = CALLS[call](ours) or [], CALLS[call](stock) or []
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two, 1e-3)
    model, other = ours.model.eval(), stock.model.eval()
    assert_close(logits(model), logits(other), 1e-3)
    assert list(model.peft_config) == list(other.peft_config)
    own, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(own) == list(theirs)
    assert model.active_adapters == [CURRENT] and model.base_model.current_task == CURRENT
    chains.assert_frozen(model, HISTORY, values)
    for name, value in chains.parameters_of(model, CURRENT).items():
        assert value.requires_grad == theirs[name].requires_grad
    for task in (*HISTORY, CURRENT):  # a task in the middle of the chain is active and frozen
        model.set_adapter(task)
        chains.assert_frozen(model, HISTORY, values)
    assert all(value.requires_grad for value in chains.parameters_of(model, CURRENT).values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"lora_dropout": 0.1, "lora_bias": True}), ("gpt2", {"use_rslora": True}), ("t5", {}), ("bert", {}),
        ("llama", {"use_dora": True}), ("llama", {"bias": "lora_only"}), ("llama", {"init_lora_weights": "pissa"}),
        ("llama", {"trainable_token_indices": [3, 4]}), ("llama", {"init_lora_weights": "mica"}),
        ("llama", {"target_parameters": ["mlp.down_proj.weight"], "target_modules": []}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_without_a_history_it_is_stock_lora_bit_for_bit(kind: str, settings: dict[str, Any]):
    """The same start and steps of training, with the settings that no chain can have too; then a second adapter."""
    models = []
    for make, more in ((lora_config, {}), (config_for, {"history": []})):
        torch.manual_seed(5)
        model = get_peft_model(tiny(kind), make(kind, **settings, **more), adapter_name="one").train()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            model(**tiny_batch(model, seed=step)).loss.backward()
            optimizer.step()
        if kind == "llama" and settings.get("init_lora_weights") != "pissa" and "target_parameters" not in settings:
            model.add_adapter("two", make(kind, **more))
            chains.fill(model, ["two"])
            model.base_model.set_adapter(["one", "two"])
        models.append(model.eval())
    (stock, ours), (theirs, own) = models, (dict(each.named_parameters()) for each in models)
    assert list(own) == list(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)
    assert {n: v.requires_grad for n, v in own.items()} == {n: v.requires_grad for n, v in theirs.items()}
    assert torch.equal(logits(ours), logits(stock))
    if "lora_bias" not in settings:  # the tiny model has no bias to merge it into
        assert_merged(ours.merge_and_unload(), stock.merge_and_unload())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_a_weighted_adapter_is_the_sum_of_the_updates(kind: str, rslora: bool, tmp_path: Path):
    """PEFT's own `cat` scales rsLoRA adapters wrongly, and copies the config with its history."""
    base, model = chain("gpt2", use_rslora=rslora, lora_bias=kind == "cat", r=3)
    weights, expected = [1.0, -0.5, 2.0], copy.deepcopy(base).requires_grad_(False)
    for task, weight in zip(TASKS, weights, strict=True):
        update = summed(base, model, [task]).state_dict()
        for name, value in expected.state_dict().items():
            value += weight * (update[name] - base.state_dict()[name])
    model.add_weighted_adapter(list(TASKS), weights, "mixture", combination_type=kind, svd_rank=9)
    model.set_adapter("mixture")
    assert model.base_model.history == () and model.peft_config["mixture"].combined
    assert_close(logits(model), logits(expected), 1e-3)
    model.save_pretrained(tmp_path, selected_adapters=["mixture"])  # the scale is in the file as well
    loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "mixture")
    assert_close(logits(loaded.eval()), logits(expected), 1e-3)
    model.add_adapter("next", config_for("gpt2", lora_bias=kind == "svd"))
    assert model.peft_config["next"].history == list(TASKS)
    with pytest.raises(ValueError, match="lora_bias"):  # one with and one without
        model.add_weighted_adapter(["dbpedia", "next"], [1, 1], "another")
    assert "another" not in model.peft_config


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_attn", "wte"])])
def test_a_mixed_batch(kind: str, targets: list[str], tmp_path: Path):
    base = tiny(kind, tie_word_embeddings=False)  # else the sum by hand would change the output layer too
    base, model = chain(kind, base=base, target_modules=targets)
    batch = {"input_ids": tiny_batch(model, batch_size=5)["input_ids"]}
    rows = {"amazon": TASKS[:2], "__base__": [], CURRENT: TASKS, "dbpedia": TASKS[:1]}
    names = [*rows, CURRENT]
    mixed = logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(mixed[row], logits(summed(base, model, rows[name]), batch)[row])
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, batch, adapter_names=["imdb"] * 5)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained on top of"):
        loaded = PeftModel.from_pretrained(base, tmp_path / CURRENT, adapter_name=CURRENT).eval()
    with pytest.raises(RuntimeError, match="'dbpedia', 'amazon'"):  # without its history
        logits(loaded, batch, adapter_names=[CURRENT, *["__base__"] * 4])
    logits(loaded, batch, adapter_names=["__base__"] * 5)


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_merging_is_equation_3(kind: str, fresh_seed: int):
    base, model = chain(kind, seed=fresh_seed, use_rslora=kind == "t5", lora_bias=kind == "gpt2")
    heads = dict.fromkeys(TASKS) if kind != "bert" else {task: task for task in TASKS}
    before, expected = logits(model), summed(base, model, TASKS, heads[CURRENT])
    model.merge_adapter()
    assert_close(logits(model), before)
    assert model.base_model.is_merged and chains.first_layer(model).merged_adapters == list(TASKS)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter(CURRENT)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.base_model.only("dbpedia").__enter__()
    model.unmerge_adapter()
    assert_close(logits(model), before)
    twin, several, earlier = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    with twin.base_model.only("amazon"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no head is left out
        assert_merged(twin.merge_and_unload(), summed(base, model, ["amazon"], heads["amazon"]))
    assert_merged(several.merge_and_unload(adapter_names=["amazon", CURRENT], safe_merge=True), expected)
    earlier.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        earlier.set_adapter("amazon")
    assert_close(logits(earlier), logits(summed(base, model, HISTORY, heads["amazon"])), 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in full precision all the same
        merged = model.merge_and_unload()
    assert_merged(merged, expected)
    assert get_peft_model(merged, config_for(kind), "next").base_model.history == (), "nothing is left of the chain"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_into_half_precision_rounds_once(dtype: torch.dtype, fresh_seed: int):
    base, model = chain("llama", base=tiny("llama").to(dtype), seed=fresh_seed)
    model.merge_adapter()
    for name, layer in model.base_model.lora_layers().items():
        parts = [(layer.scaling[task], layer.lora_B[task].weight, layer.lora_A[task].weight) for task in TASKS]
        update = sum(scale * B.double() @ A.double() for scale, B, A in parts)
        expected = (base.get_submodule(name).weight.double() + update).to(dtype)
        assert layer.base_layer.weight.dtype == dtype
        assert (layer.base_layer.weight != expected).float().mean() < 0.02  # float32 against float64, on a tie


def test_merging_that_fails_leaves_the_model_as_it_was():
    base, model = chain("llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'imdb'"):
            merge(adapter_names=["imdb"])
        with pytest.raises(TypeError, match="adapter_names='amazon'"):
            merge(adapter_names="amazon")
        chains.assert_is_sum(model, base, TASKS)
