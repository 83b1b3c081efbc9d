"""Every call that PEFT offers, on a task with a history: the history stays frozen and takes part."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_config,
    get_peft_model,
)
from peft.helpers import rescale_adapter_scale

from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import (
    TASKS,
    assert_frozen,
    assert_is_sum,
    chain,
    config_for,
    copy_of,
    fill,
    logits,
    summed,
)

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


@dataclass
class Case:
    """What a call left behind.

    Attributes:
        model: the model after the call.
        active: the task that is active.
        names: the adapters that the forward pass sums.
        frozen: the adapters that are history.
    """

    model: Any
    active: str = CURRENT
    names: tuple[str, ...] = TASKS
    frozen: tuple[str, ...] = HISTORY


def _saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path / "chain")
    return path / "chain"


def _loaded(model: Any, path: Path, **settings: Any) -> Any:
    """The whole chain, read from the disk onto a new base model."""
    folder = _saved(model, path)
    loaded = PeftModel.from_pretrained(tiny("llama"), folder / TASKS[0], adapter_name=TASKS[0])
    for task in TASKS[1:]:
        loaded.load_adapter(folder / task, adapter_name=task, **settings)
    loaded.set_adapter(CURRENT)
    return loaded.eval()


def _in_any_order(model: Any, path: Path) -> Any:
    folder = _saved(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the history is not here yet: see test_model.py
        loaded = PeftModel.from_pretrained(tiny("llama"), folder / CURRENT, adapter_name=CURRENT)
        for task in (TASKS[1], TASKS[0]):
            loaded.load_adapter(folder / task, adapter_name=task, is_trainable=True)
    return loaded.eval()


def _set_adapter_and_back(model: Any, path: Path) -> Any:
    for task in (*TASKS, TASKS[0], CURRENT):
        model.set_adapter(task)
    return model


def _disabled(model: Any, path: Path) -> Any:
    with model.disable_adapter():
        assert_frozen(model, HISTORY)
        torch.testing.assert_close(logits(model), logits(tiny("llama")))
    return model


def _layers_off_and_on(model: Any, path: Path) -> Any:
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(logits(model), logits(tiny("llama")))
    model.base_model.enable_adapter_layers()
    return model


def _requires_grad(model: Any, path: Path) -> Any:
    model.set_requires_grad(list(TASKS), requires_grad=True)
    model.set_requires_grad(TASKS[0])
    model.base_model.set_requires_grad(list(TASKS))
    return model


def _merged_and_back(model: Any, path: Path) -> Any:
    for names in (None, [CURRENT]):
        model.merge_adapter(adapter_names=names)
        assert model.get_model_status().merged_adapters == sorted(TASKS)
        torch.testing.assert_close(logits(model), logits(summed(tiny("llama"), model, TASKS)), rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    return model


def _weighted(kind: str) -> Callable[[Any, Path], Any]:
    def call(model: Any, path: Path) -> Any:
        model.add_weighted_adapter(list(TASKS), [1.0, 0.5, 2.0], "mixture", combination_type=kind, svd_rank=6)
        return model

    return call


def _added_and_deleted(model: Any, path: Path) -> Any:
    model.add_adapter("imdb", config_for("llama"))
    assert_frozen(model, TASKS)
    model.delete_adapter("imdb")
    model.set_adapter(CURRENT)
    return model


def _deleted_while_active(model: Any, path: Path) -> Any:
    model.add_adapter("imdb", config_for("llama"))
    model.set_adapter("imdb")
    with pytest.warns(UserWarning, match="'imdb' is deleted; 'agnews' is active now"):
        model.delete_adapter("imdb")
    return model


def _statuses(model: Any, path: Path) -> Any:
    status = model.get_model_status()
    assert status.active_adapters == [CURRENT] and status.available_adapters == sorted(TASKS)
    assert status.requires_grad == {**dict.fromkeys(HISTORY, False), CURRENT: True}
    assert all(layer.active_adapters == [CURRENT] for layer in model.get_layer_status())
    return model


def _rescaled(model: Any, path: Path) -> Any:
    before = logits(model)
    with rescale_adapter_scale(model, 0.5):
        assert_is_sum(model, tiny("llama"), TASKS)
        assert not torch.allclose(logits(model), before)
    return model


def _whole_model_through_torch(model: Any, path: Path) -> Any:
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


def _state_dict(model: Any, path: Path) -> Any:
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any("attribution" in name or "task" in name for name in values)
    model.load_state_dict(values)
    return model


def _reloaded_over_itself(model: Any, path: Path) -> Any:
    folder = _saved(model, path)
    for task in TASKS:
        for low in (False, True):
            model.load_adapter(folder / task, adapter_name=task, is_trainable=True, low_cpu_mem_usage=low)
    return model


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "get_peft_model, add_adapter, set_adapter": lambda model, path: model,
    "from_pretrained, load_adapter": lambda model, path: _loaded(model, path),
    "load_adapter(is_trainable=True)": lambda model, path: _loaded(model, path, is_trainable=True),
    "load_adapter(low_cpu_mem_usage=True)": lambda model, path: _loaded(model, path, low_cpu_mem_usage=True),
    "load_adapter(low_cpu_mem_usage=True, is_trainable=True)": lambda model, path: _loaded(
        model, path, low_cpu_mem_usage=True, is_trainable=True
    ),
    "load_adapter, the newest first": _in_any_order,
    "load_adapter over itself": _reloaded_over_itself,
    "set_adapter": _set_adapter_and_back,
    "set_adapter(inference_mode=True)": lambda model, path: model.set_adapter(CURRENT, inference_mode=True) or model,
    "base_model.set_adapter of a list": lambda model, path: model.base_model.set_adapter([CURRENT]) or model,
    "add_adapter, delete_adapter": _added_and_deleted,
    "delete_adapter of the active one": _deleted_while_active,
    "disable_adapter": _disabled,
    "disable_adapter_layers, enable_adapter_layers": _layers_off_and_on,
    "set_requires_grad": _requires_grad,
    "merge_adapter, unmerge_adapter": _merged_and_back,
    "add_weighted_adapter svd": _weighted("svd"),
    "add_weighted_adapter cat": _weighted("cat"),
    "add_weighted_adapter linear": _weighted("linear"),
    "save_pretrained": lambda model, path: _saved(model, path) and model,
    "save_pretrained(selected_adapters)": lambda model, path: (
        model.save_pretrained(path, selected_adapters=[CURRENT]) or model
    ),
    "print_trainable_parameters": lambda model, path: model.print_trainable_parameters() or model,
    "get_layer_status, get_model_status": _statuses,
    "generate": lambda model, path: (
        model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False) is None or model
    ),
    "train, eval": lambda model, path: model.train().eval(),
    "to(float64), to(float32)": lambda model, path: model.to(torch.float64).to(torch.float32),
    "state_dict, load_state_dict": _state_dict,
    "copy.deepcopy": lambda model, path: copy.deepcopy(model),
    "torch.save, torch.load": _whole_model_through_torch,
    "rescale_adapter_scale": _rescaled,
}


@pytest.mark.parametrize("call", CALLS)
def test_after_the_call(call: str, tmp_path: Path):
    base, model = chain("llama")
    values = copy_of(model, TASKS)
    logits(model)  # fills the caches
    model = CALLS[call](model, tmp_path).eval()
    assert model.active_adapters == [CURRENT] and model.base_model.current_task == CURRENT
    exact = {name: value for name, value in values.items() if f".{CURRENT}." not in f"{name}."}
    if "merge" in call:  # adding and taking away the deltas touches the base weights, not the adapters
        assert_frozen(model, HISTORY, exact)
        torch.testing.assert_close(logits(model), logits(summed(base, model, TASKS)), rtol=1e-3, atol=1e-3)
    else:
        assert_frozen(model, HISTORY, exact)
        assert_is_sum(model, base, TASKS)
    for task in HISTORY:  # the same for a task in the middle of the chain
        model.set_adapter(task)
        assert model.active_adapters == [task]
        assert_frozen(model, HISTORY, exact)


def test_what_trains_is_what_trains_with_plain_lora(tmp_path: Path):
    """The number of parameters that train, after each of the calls that touch it, is one adapter's."""
    _, model = chain("llama")
    alone = get_peft_model(tiny("llama"), config_for("llama")).get_nb_trainable_parameters()[0]
    assert model.get_nb_trainable_parameters()[0] == alone > 0
    with model.disable_adapter():
        assert model.get_nb_trainable_parameters()[0] == 0
    assert model.get_nb_trainable_parameters()[0] == alone
    model.set_adapter(CURRENT, inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter(HISTORY[0])  # it is history: active, and frozen
    assert model.get_nb_trainable_parameters()[0] == 0
    loaded = _loaded(model, tmp_path, is_trainable=True)
    assert loaded.get_nb_trainable_parameters()[0] == alone


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("names", [None, [CURRENT], [HISTORY[1]]])
def test_merge_and_unload(names: list[str] | None, safe_merge: bool):
    base, model = chain("llama")
    expected = summed(base, model, TASKS if names != [HISTORY[1]] else HISTORY)
    merged = model.merge_and_unload(adapter_names=names, safe_merge=safe_merge)
    assert not any("lora" in name for name, _ in merged.named_modules())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)
    again = get_peft_model(merged, config_for("llama"), adapter_name="next")  # nothing is left behind
    torch.testing.assert_close(logits(again.eval()), logits(expected), rtol=1e-4, atol=1e-4)


def test_unload_gives_the_base_model_back():
    base, model = chain("llama")
    unloaded = model.unload()
    assert all(torch.equal(value, unloaded.state_dict()[name]) for name, value in base.state_dict().items())
    assert torch.equal(logits(unloaded), logits(base))


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("llama", AutoPeftModelForCausalLM),
        ("t5", AutoPeftModelForSeq2SeqLM),
        ("bert", AutoPeftModelForSequenceClassification),
    ],
)
def test_auto_classes_load_a_chain(kind: str, auto: Any, tmp_path: Path):
    tiny(kind).save_pretrained(tmp_path / "base")
    base = tiny(kind)
    base.name_or_path = str(tmp_path / "base")
    base, model = chain(kind, TASKS[:2], base=base)
    model.save_pretrained(tmp_path / "chain")
    more = {"num_labels": base.config.num_labels} if kind == "bert" else {}
    loaded = auto.from_pretrained(tmp_path / "chain" / TASKS[0], adapter_name=TASKS[0], **more)
    loaded.load_adapter(tmp_path / "chain" / TASKS[1], adapter_name=TASKS[1])
    loaded.set_adapter(TASKS[1])
    assert_frozen(loaded, TASKS[:1], copy_of(model, TASKS[:1]))
    assert_is_sum(loaded, base, TASKS[:2], head=TASKS[1])


def test_get_peft_config_reads_what_was_saved(tmp_path: Path):
    _, model = chain("llama")
    config: Any = get_peft_config(model.peft_config[CURRENT].to_dict())
    assert config.history == list(HISTORY) and config.task_name == CURRENT


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_a_weighted_adapter_is_the_exact_sum_of_the_deltas(kind: str, rslora: bool, tmp_path: Path):
    base = tiny("gpt2")
    _, model = chain("gpt2", base=base, use_rslora=rslora, lora_bias=kind == "cat", r=3)
    weights = [1.0, -0.5, 2.0]
    expected = summed(base, model, [])
    with torch.no_grad():
        for task, weight in zip(TASKS, weights, strict=True):
            delta = summed(base, model, [task]).state_dict()
            for name, value in expected.state_dict().items():
                value += weight * (delta[name] - base.state_dict()[name])
    model.add_weighted_adapter(list(TASKS), weights, "mixture", combination_type=kind, svd_rank=9)
    model.set_adapter("mixture")
    assert model.base_model.history == () and model.peft_config["mixture"].combined
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path, selected_adapters=["mixture"])  # the scale is in the file as well
    loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "mixture")
    torch.testing.assert_close(logits(loaded.eval()), logits(expected), rtol=1e-3, atol=1e-3)
    model.add_adapter("next", config_for("gpt2"))
    assert model.peft_config["next"].history == list(TASKS)


def test_a_linear_combination_is_plain_lora_s():
    _, model = chain("llama", use_rslora=True)
    model.add_weighted_adapter(list(TASKS[:2]), [0.5, 2.0], "mixture", combination_type="linear")
    scale = 8 / 2**0.5
    for layer in model.base_model.lora_layers().values():
        a = sum((w * scale) ** 0.5 * layer.lora_A[t].weight for t, w in zip(TASKS, (0.5, 2.0), strict=False))
        b = sum((w * scale) ** 0.5 * layer.lora_B[t].weight for t, w in zip(TASKS, (0.5, 2.0), strict=False))
        found = layer.lora_B["mixture"].weight @ layer.lora_A["mixture"].weight * layer.scaling["mixture"]
        torch.testing.assert_close(found, b @ a, rtol=1e-4, atol=1e-5)


def test_adapters_with_and_without_bias_are_not_combined():
    _, model = chain("gpt2", TASKS[:1], lora_bias=True)
    model.add_adapter("amazon", config_for("gpt2"))
    with pytest.raises(ValueError, match="some have lora_bias and some do not"):
        model.add_weighted_adapter(list(TASKS[:2]), [1, 1], "mixture")
    assert "mixture" not in model.peft_config


def test_a_weighted_adapter_with_a_bad_name_leaves_nothing_behind():
    _, model = chain("llama")
    with pytest.raises(ValueError, match="cannot be called 'layers'"):
        model.add_weighted_adapter(list(TASKS), [1, 1, 1], "layers", combination_type="cat")
    assert list(model.peft_config) == list(TASKS)


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_attn", "wte"])])
def test_a_mixed_batch_gives_each_row_its_task_with_its_history(kind: str, targets: list[str]):
    base = tiny(kind, tie_word_embeddings=False)  # else the sum by hand would change the output layer too
    base, model = chain(kind, base=base, target_modules=targets)
    batch = {"input_ids": tiny_batch(model, batch_size=5)["input_ids"]}
    names = ["amazon", "__base__", "agnews", "dbpedia", "agnews"]
    mixed = logits(model, batch, adapter_names=names)
    rows = {"__base__": [], "dbpedia": TASKS[:1], "amazon": TASKS[:2], "agnews": TASKS}
    for row, name in enumerate(names):
        expected = logits(summed(base, model, rows[name]), batch)[row]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)
        if name != "__base__":
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], logits(model, batch)[row], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, batch, adapter_names=["imdb"] * 5)


def test_a_mixed_batch_of_one_task_without_its_history_is_an_error(tmp_path: Path):
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained on top of"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / CURRENT, adapter_name=CURRENT).eval()
    batch = {"input_ids": torch.tensor([[3, 4]] * 2)}
    with pytest.raises(RuntimeError, match="not loaded: 'dbpedia', 'amazon'"):
        logits(loaded, batch, adapter_names=[CURRENT, "__base__"])
    logits(loaded, batch, adapter_names=["__base__", "__base__"])


def test_beams_get_their_row_s_history():
    _, model = chain("t5", base=tiny("t5", num_decoder_layers=2))
    batch = {k: v for k, v in tiny_batch(model, batch_size=2).items() if k != "labels"}
    settings = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    mixed = model.generate(**batch, adapter_names=["dbpedia", "agnews"], **settings)
    for row, name in enumerate(["dbpedia", "agnews"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(**batch, **settings)[row])


def test_bfloat16_models_with_embeddings_stay_frozen_after_a_reload(tmp_path: Path):
    """PEFT's cast to float32 makes new parameters of an embedding's matrices, and those train."""
    settings: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"]}
    _, model = chain("llama", TASKS[:2], base=tiny("llama").to(torch.bfloat16), **settings)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        model.load_adapter(tmp_path / TASKS[0], adapter_name=TASKS[0], low_cpu_mem_usage=low)
        assert_frozen(model, TASKS[:1])
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)


def test_deleting_the_last_adapter_is_as_with_plain_lora():
    from peft import LoraConfig

    stock = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ours = get_peft_model(tiny("llama"), config_for("llama"))
    for model in (stock, ours):
        model.delete_adapter("default")
    assert ours.active_adapters == stock.active_adapters == []
    assert not ours.peft_config
    ours.add_adapter("again", config_for("llama"))
    ours.set_adapter("again")
    fill(ours, ["again"])
    assert_is_sum(ours.eval(), tiny("llama"), ["again"])
