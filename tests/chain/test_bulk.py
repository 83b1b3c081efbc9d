"""A chain that is added at once is, to the last attribute, the chain that PEFT adds adapter by adapter."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_aso import ASOLoraConfig, load_chain, load_history
from peft_aso.chain import loading, save_chain
from peft_aso.tuner.bulk import SavedAdapter, add_saved
from tests.chain.chains import logits, make_chain, randomize, settings, stock_adapter
from tests.chain.same import check_same
from tests.tiny_models import tiny

ARCHITECTURES = ("llama", "gpt2", "t5", "bert")
# of each architecture, modules with a bias (for lora_bias) or without, and the embedding
CHOICES: dict[str, list[list[str]]] = {
    "llama": [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "embed_tokens"], ["layers.1.self_attn.o_proj"]],
    "gpt2": [["c_attn"], ["c_attn", "wte"], ["c_fc"]],
    "t5": [["q", "v"], ["k", "wo"], ["shared", "q"]],
    "bert": [["query", "value"], ["word_embeddings", "key"], ["intermediate.dense"]],
}
PATTERN = {"llama": "q_proj", "gpt2": "h.1.attn.c_attn", "t5": "decoder.*.v", "bert": "layer.0.attention.self.query"}
DTYPES = [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]


def one_by_one(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]) -> Any:
    """What `load` returns if no adapter is added in bulk."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "fits_bulk", lambda adapter: False)
        patch.setattr(loading, "add_saved", None)
        return load()


def in_bulk(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]) -> Any:
    """What `load` returns; it is an error if one adapter goes PEFT's way."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "set_peft_model_state_dict", None)
        return load()


def random_tasks(architecture: str, seed: int, count: int = 4) -> dict[str, dict[str, Any]]:
    """Settings of a chain in which no two adapters need be alike."""
    draw = random.Random(seed)
    tasks: dict[str, dict[str, Any]] = {}
    for index in range(count):
        targets = draw.choice(CHOICES[architecture])
        embeds = any(name in ("embed_tokens", "wte", "shared", "word_embeddings") for name in targets)
        biased = not embeds and draw.random() < 0.5
        tasks[f"task{index}"] = {
            "r": draw.randint(1, 5),
            "lora_alpha": draw.randint(1, 40),
            "target_modules": targets,
            "use_rslora": draw.random() < 0.5,
            "lora_bias": biased,
            "lora_dropout": draw.choice([0.0, 0.25]),
            "init_lora_weights": draw.choice([True, False] if biased else [True, "gaussian", False]),
            "history": draw.choice([None, draw.sample(list(tasks), draw.randint(0, index))]),
            "forward_history": draw.choice(["stacked", "isolated"]),
            # without a head of its own the classifier runs with the base model's
            "task_type": None if architecture == "bert" else settings(architecture)["task_type"],
        }
        if targets == CHOICES[architecture][0]:
            tasks[f"task{index}"] |= {"rank_pattern": {PATTERN[architecture]: 6}, "alpha_pattern": {targets[0]: 3}}
    return tasks


def vectors_for(model: Any) -> None:
    """Give every other task an attribution vector."""
    for name in list(model.peft_config)[::2]:
        model.base_model.attribution[name] = torch.randn(24)
        model.peft_config[name].attribution_layout = [["some.module", 0, 24]]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_chains(
    architecture: str, trainable: bool, tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_chain(architecture, random_tasks(architecture, fresh_seed), seed=fresh_seed)
    vectors_for(model)
    save_chain(model, tmp_path)

    def load() -> Any:
        return load_chain(tiny(architecture), tmp_path, trainable=trainable)

    loaded = in_bulk(monkeypatch, load)
    check_same(loaded, one_by_one(monkeypatch, load))
    for task in model.peft_config:
        loaded.set_adapter(task)
        model.set_adapter(task)
        torch.testing.assert_close(logits(loaded.eval()), logits(model))
        expected = one_by_one(monkeypatch, load)
        expected.set_adapter(task)
        check_same(loaded, expected.eval())


@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(
    dtype: torch.dtype, autocast: bool, saved_dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chain(tasks={"one": {}, "two": {"target_modules": ["q_proj", "embed_tokens"]}}).to(
        saved_dtype
    ).save_pretrained(str(tmp_path), save_embedding_layers=False)

    def load() -> Any:
        return load_chain(tiny("llama").to(dtype), tmp_path, autocast_adapter_dtype=autocast)

    loaded = in_bulk(monkeypatch, load)
    check_same(loaded, one_by_one(monkeypatch, load))
    in_file = load_file(tmp_path / "one" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    held = loaded.get_submodule(key.removesuffix(".weight"))["one"].weight
    assert held.dtype == (torch.float32 if autocast else dtype)
    assert torch.equal(held, in_file[key].to(held.dtype))  # not rounded to the base model's dtype on the way


@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions(tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Of a plain module: an adapter on a convolution, and one on a linear layer with an odd shape."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(3, 6, 3, groups=groups)
            self.read = nn.Linear(6, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read(self.mix(x).mean(-1))

    def base() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    model: Any = base()
    for name, config in {
        "one": ASOLoraConfig(r=3, lora_alpha=5, target_modules=["mix"]),
        "two": ASOLoraConfig(r=6, lora_alpha=5, target_modules=["mix", "read"]),
    }.items():
        if name == "one":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.normal_()
    save_chain(model, tmp_path)
    loaded = in_bulk(monkeypatch, lambda: load_chain(base(), tmp_path))
    check_same(loaded, one_by_one(monkeypatch, lambda: load_chain(base(), tmp_path)))


def test_heads_and_plain_adapters_in_one_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two come in bulk; from the third on, the model has copied modules and PEFT adds."""
    tasks: dict[str, dict[str, Any]] = {"one": {}, "two": {"r": 3}, "three": {"modules_to_save": ["norm"]}, "four": {}}
    make_chain(tasks=tasks).save_pretrained(str(tmp_path))
    check_same(
        load_chain(tiny("llama"), tmp_path),
        one_by_one(monkeypatch, lambda: load_chain(tiny("llama"), tmp_path)),
    )
    added: list[str] = []

    def spy(tuner: Any, adapters: list[SavedAdapter], **options: Any) -> None:
        added.extend(adapter.name for adapter in adapters)
        add_saved(tuner, adapters, **options)

    monkeypatch.setattr(loading, "add_saved", spy)
    load_chain(tiny("llama"), tmp_path)
    assert added == ["one", "two"]


def test_classifiers_get_their_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain adapter after a classifier's gets a head from PEFT, and so it does here."""
    make_chain("bert", {"one": {}, "two": {}}).save_pretrained(str(tmp_path))
    check_same(load_chain(tiny("bert"), tmp_path), one_by_one(monkeypatch, lambda: load_chain(tiny("bert"), tmp_path)))


def test_walks_over_the_model_do_not_grow_with_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chain(tasks={f"task{index}": {} for index in range(8)}).save_pretrained(str(tmp_path))
    walks: list[int] = []

    def counted(base: nn.Module, last: str) -> int:
        walks.clear()
        plain = nn.Module.named_modules

        def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is base and not args and "prefix" not in kwargs:
                walks.append(1)
            return plain(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", named_modules)
            load_chain(base, tmp_path, tasks=[last])
        return len(walks)

    counts = [counted(tiny("llama"), last) for last in ("task1", "task3", "task7")]
    assert counts[0] == counts[1] == counts[2] > 0
    one, two = (
        one_by_one(monkeypatch, lambda last=last: counted(tiny("llama"), last))  # type: ignore[misc]
        for last in ("task1", "task3")
    )
    assert two > one > counts[0]


def test_random_numbers_collector_and_layers_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {
        "one": {"target_modules": ["q_proj", "embed_tokens"]},
        "two": {"target_modules": ["embed_tokens", "k_proj"]},
    }
    make_chain(tasks=tasks).save_pretrained(str(tmp_path), save_embedding_layers=False)
    base, again = tiny("llama"), tiny("llama")
    state = torch.get_rng_state()
    model = load_chain(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert gc.isenabled()
    for layer in model.base_model.lora_layers().values():
        assert not {"set_adapter", "_move_adapter_to_device_of_base_layer"} & set(vars(layer))
    one_by_one(monkeypatch, lambda: load_chain(again, tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    gc.disable()
    try:
        load_chain(tiny("llama"), tmp_path)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_loaded_model_trains_copies_and_saves(tmp_path: Path) -> None:
    make_chain(tasks={f"task{index}": {} for index in range(4)}).save_pretrained(str(tmp_path / "one"))
    model = load_chain(tiny("llama"), tmp_path / "one", trainable=True)
    check_same(copy.deepcopy(model), model)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all((parameter.grad is not None) == (".task3." in name) for name, parameter in model.named_parameters())
    model.add_adapter("task4", ASOLoraConfig(**settings("llama")))
    model.set_adapter("task4")
    randomize(model, "task4")
    save_chain(model, tmp_path / "two")
    again = load_chain(tiny("llama"), tmp_path / "two")
    assert torch.equal(logits(again), logits(model.eval()))


# ---- load_history -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("training", [True, False])
def test_history_for_a_model_that_has_adapters(
    architecture: str, training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the modules have adapters already and some get their first; what trains goes on training."""
    targets = [*CHOICES[architecture][0], *CHOICES[architecture][2]]
    stock_adapter(tmp_path / "plain", architecture, target_modules=targets, r=3, lora_dropout=0.5)

    def load() -> Any:
        return load_history(make_chain(architecture).train(training), tmp_path / "plain")

    loaded = in_bulk(monkeypatch, load)
    check_same(loaded, one_by_one(monkeypatch, load))
    assert torch.equal(logits(loaded.eval()), logits(make_chain(architecture)))
    loaded.set_adapter("plain")
    assert not torch.equal(logits(loaded), logits(make_chain(architecture)))


def test_history_for_a_bare_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_adapter(tmp_path / "plain")
    check_same(
        in_bulk(monkeypatch, lambda: load_history(tiny("llama"), tmp_path / "plain")),
        one_by_one(monkeypatch, lambda: load_history(tiny("llama"), tmp_path / "plain")),
    )


def test_settings_that_peft_mends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fan_in_fan_out is wrong for these layers; PEFT says so where it makes new ones, and sets it right."""
    make_chain(tasks={"one": {}, "two": {"target_modules": ["k_proj"]}, "three": {}}).save_pretrained(str(tmp_path))
    for name in ("one", "two", "three"):
        path = tmp_path / name / "adapter_config.json"
        path.write_text(path.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": true'))
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        loaded = in_bulk(monkeypatch, lambda: load_chain(tiny("llama"), tmp_path))
    assert [config.fan_in_fan_out for config in loaded.peft_config.values()] == [False, False, True]
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        check_same(loaded, one_by_one(monkeypatch, lambda: load_chain(tiny("llama"), tmp_path)))


def test_nan_in_a_file_is_found(tmp_path: Path) -> None:
    make_chain().save_pretrained(str(tmp_path))
    path = tmp_path / "second" / "adapter_model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[3]].view(-1)[-1] = float("nan")
    save_file(weights, path)
    base = tiny("llama")
    with pytest.raises(loading.ChainError, match="'second' hold NaN or Inf"):
        load_chain(base, tmp_path)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
