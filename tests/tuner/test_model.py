"""Adapters come and go: a first task is plain LoRA, names are checked, and a failure leaves nothing behind."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter

from peft_aso import ASOLoraConfig, HistoryError, MissingHistoryError
from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import (
    TASKS,
    assert_frozen,
    assert_is_sum,
    assert_same,
    chain,
    config_for,
    copy_of,
    fill,
    logits,
    parameters_of,
    state_of,
)

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


# ---- a first task is plain LoRA ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_a_first_task_is_plain_lora_bit_for_bit(kind: str):
    """The same start, and with dropout the same ten steps of training."""
    models = []
    for cls in (LoraConfig, ASOLoraConfig):
        settings = config_for(kind, lora_dropout=0.1)
        torch.manual_seed(5)
        config = cls(**{name: getattr(settings, name) for name in LoraConfig().to_dict() if name != "peft_type"})
        model = get_peft_model(tiny(kind), config, adapter_name="dbpedia").train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in range(10):
            optimizer.zero_grad()
            model(**tiny_batch(model, seed=step)).loss.backward()
            optimizer.step()
        models.append(model)
    stock, ours = (dict(model.named_parameters()) for model in models)
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert any(value.any() for name, value in ours.items() if "lora_B" in name)
    assert torch.equal(logits(models[0].eval()), logits(models[1].eval()))
    assert models[1].base_model.orthogonality_penalty().item() == 0


def test_training_leaves_the_history_bit_for_bit():
    _, model = chain("llama", lora_dropout=0.1)
    values = copy_of(model, TASKS)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        loss = model(**tiny_batch(model, seed=step)).loss + model.base_model.orthogonality_penalty()
        loss.backward()
        optimizer.step()
    assert_frozen(model, HISTORY, {n: v for n, v in values.items() if f".{CURRENT}." not in n})
    assert all(p.grad is None for task in HISTORY for p in parameters_of(model, task).values())
    for name, parameter in parameters_of(model, CURRENT).items():
        assert not torch.equal(parameter, values[name]), f"{name} has not learned"


# ---- history -----------------------------------------------------------------------------------------------


def test_one_config_serves_for_several_tasks():
    config = config_for("llama")
    model = get_peft_model(tiny("llama"), config, adapter_name="dbpedia")
    model.add_adapter("amazon", config)
    assert (config.task_name, config.history) == (None, None)
    assert model.peft_config["amazon"].history == ["dbpedia"]
    assert model.peft_config["dbpedia"] is not model.peft_config["amazon"]
    with pytest.raises(HistoryError, match="holds the task 'amazon' already"):
        model.add_adapter("agnews", model.peft_config["amazon"])
    assert list(model.peft_config) == ["dbpedia", "amazon"]


def test_tasks_of_different_shape():
    """Ranks, alphas, patterns and target modules differ; the last task shares no module with the first."""
    base = tiny("llama")
    model = get_peft_model(
        copy.deepcopy(base), config_for("llama", r=4, target_modules=["q_proj"], lora_alpha=2), "dbpedia"
    )
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 32}}
    model.add_adapter("amazon", config_for("llama", r=3, target_modules=["q_proj", "v_proj"], **patterns))
    model.add_adapter("agnews", config_for("llama", target_modules=["down_proj"], use_rslora=True))
    fill(model, TASKS)
    for number, task in enumerate(TASKS):
        model.set_adapter(task)
        assert_is_sum(model.eval(), base, TASKS[: number + 1])
        assert model.base_model.history == TASKS[:number]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),  # scales its embeddings
        ("gpt2", {}),  # Conv1D: weights are (in, out)
        ("gpt2", {"lora_bias": True}),
        ("t5", {}),
        ("bert", {}),
    ],
)
def test_kinds_of_layers(kind: str, settings: dict[str, Any]):
    base = tiny(kind) if kind in ("t5", "bert") else tiny(kind, tie_word_embeddings=False)
    settings = {"task_type": "CAUSAL_LM", **settings} if kind == "gemma3" else settings
    config = ASOLoraConfig(r=2, lora_alpha=8, **settings) if kind == "gemma3" else None
    if config is None:
        base, model = chain(kind, base=base, **settings)
    else:
        model = get_peft_model(copy.deepcopy(base), config, TASKS[0])
        for task in TASKS[1:]:
            model.add_adapter(task, config)
        model.set_adapter(CURRENT)
        fill(model, TASKS)
    assert_is_sum(model.eval(), base, TASKS, head=CURRENT if kind == "bert" else None)


def test_convolutions():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.conv1 = torch.nn.Conv1d(4, 5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv1(self.conv(x).flatten(2))

    base = Net()
    model = get_peft_model(copy.deepcopy(base), ASOLoraConfig(r=2, target_modules=["conv", "conv1"]), "one")
    model.add_adapter("two", ASOLoraConfig(r=3, target_modules=["conv", "conv1"], lora_bias=True))
    model.set_adapter("two")
    fill(model, ["one", "two"])
    x = torch.randn(2, 3, 4, 4)
    found = model(x)
    torch.testing.assert_close(found, model.merge_and_unload()(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, base(x))


def test_a_task_may_be_loaded_before_its_history(tmp_path: Path):
    base, model = chain("llama")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'default' was trained on top of \['dbpedia', 'amazon'\].*Load them"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / CURRENT).eval()  # called "default"
    missing = rf"not loaded: 'dbpedia', 'amazon'.*load_chain\(base, {str(tmp_path)!r}\)"
    for call in (
        lambda: logits(loaded),
        lambda: loaded.merge_and_unload(),
        lambda: loaded.merge_adapter(),
        lambda: loaded.base_model.orthogonality_penalty(),
    ):
        with pytest.raises(MissingHistoryError, match=missing):
            call()
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(base))
    with loaded.base_model.only("default"):
        assert_is_sum(loaded, base, ["default"])
    with pytest.warns(UserWarning, match=r"'second' was trained on top of \['dbpedia'\]"):
        loaded.load_adapter(tmp_path / "amazon", adapter_name="second")
    with pytest.raises(MissingHistoryError, match="not loaded: 'dbpedia'"):
        logits(loaded)
    loaded.load_adapter(tmp_path / "dbpedia", adapter_name="first")
    assert loaded.base_model.history == ("first", "second")
    assert loaded.base_model.task_name("first") == "dbpedia"
    assert_is_sum(loaded, base, ["first", "second", "default"])
    torch.testing.assert_close(logits(loaded), logits(model))


def test_project_init_starts_orthogonal_also_in_half_precision():
    for dtype in (torch.float32, torch.bfloat16):
        _, model = chain("llama", TASKS[:2], base=tiny("llama").to(dtype))
        model.add_adapter("agnews", config_for("llama", project_init=True, r=3))
        model.set_adapter("agnews")
        assert model.base_model.orthogonality_penalty().item() < 1e-10
        for layer in model.base_model.lora_layers().values():
            assert layer.lora_A["agnews"].weight.abs().max() > 0.01
        fill(model, ["agnews"])
        assert model.base_model.orthogonality_penalty().item() > 0.1


def test_project_init_without_room_is_an_error_and_leaves_no_adapter():
    _, model = chain("llama", ["dbpedia"], r=16, target_modules=["q_proj"])
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="project_init: .* all 16 input dimensions"):
        model.add_adapter("amazon", config_for("llama", project_init=True, target_modules=["q_proj"]))
    assert list(model.state_dict()) == before and list(model.peft_config) == ["dbpedia"]


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["layers", "self_attn", "0", "weight", "model", "base_model", "lora_A", "a.b", "a/b", "", "__base__"]
)
def test_names_that_peft_would_confuse(name: str):
    _, model = chain("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match="cannot be called|Adapter name"):
        model.add_adapter(name, config_for("llama"))
    assert_same(model, before)


@pytest.mark.parametrize("name", ["model", "h", "wte"])
def test_names_that_peft_would_confuse_in_a_first_adapter(name: str):
    with pytest.raises(ValueError, match="cannot be called"):
        get_peft_model(tiny("gpt2"), config_for("gpt2"), adapter_name=name)


OBSTACLES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "alora": {"alora_invocation_tokens": [3, 4]},
    "tokens": {"trainable_token_indices": [3, 4]},
    "velora": {"velora_config": {"num_groups": 2}},
    "kasa": {"kasa_config": {}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_is_no_sum_is_refused_in_a_chain(obstacle: str):
    settings = OBSTACLES[obstacle]
    _, model = chain("llama")
    before = state_of(model)
    with pytest.raises(HistoryError, match="'imdb' cannot be (part of a chain|added).*(alone|another)"):
        model.add_adapter("imdb", config_for("llama", **settings))
    assert_same(model, before)
    if obstacle in ("corda", "loftq"):  # need data, or a library, to start at all
        return
    alone = get_peft_model(tiny("llama"), config_for("llama", **settings), adapter_name="alone").eval()
    logits(alone)
    with pytest.raises(HistoryError, match="init_lora_weights|cannot be part of a chain"):
        alone.add_adapter("next", config_for("llama"))
    assert list(alone.peft_config) == ["alone"]
    if obstacle in ("dora", "bias"):
        alone.add_adapter("next", config_for("llama", history=[]))


def test_a_history_that_is_no_sum_is_refused_when_it_comes_after_its_task(tmp_path: Path):
    _, model = chain("llama", TASKS[:2])
    model.save_pretrained(tmp_path)
    dora = get_peft_model(tiny("llama"), config_for("llama", use_dora=True), adapter_name="dbpedia")
    dora.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained on top of"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "amazon", adapter_name="amazon")
    with pytest.raises(HistoryError, match="'dbpedia' cannot be part of a chain of tasks: use_dora"):
        loaded.load_adapter(tmp_path / "dbpedia", adapter_name="dbpedia")
    assert list(loaded.peft_config) == ["amazon"] and not any("dbpedia" in n for n in loaded.state_dict())


def test_attention_modules_cannot_carry_a_history():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.attention(query=x, key=x, value=x)[0])

    config = ASOLoraConfig(r=2, target_modules=["attention", "out"])
    model = get_peft_model(Net(), config, adapter_name="one")
    before, x = list(model.state_dict()), torch.randn(2, 3, 8)
    expected = model(x)
    for second in (config, ASOLoraConfig(r=2, target_modules=["out"])):
        with pytest.raises(HistoryError, match="attention is a MultiheadAttention.*history=\\[\\]"):
            model.add_adapter("two", second)
        assert list(model.state_dict()) == before and torch.equal(model(x), expected)


def test_an_error_in_the_middle_of_adding_leaves_the_model_as_it_was():
    """Most layers have the adapter already when PEFT comes to the one with a rank of 0."""
    _, model = chain("llama", target_modules=["q_proj"])
    before = state_of(model)
    settings: dict[str, Any] = {
        "rank_pattern": {"layers.2.mlp.down_proj": 0},
        "target_modules": ["q_proj", "down_proj"],
    }
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        model.add_adapter("imdb", config_for("llama", **settings))
    assert_same(model, before)
    model.add_adapter("imdb", config_for("llama", target_modules=["q_proj", "down_proj"]))
    base = tiny("llama")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        get_peft_model(base, config_for("llama", **settings))
    assert [name for name, _ in base.named_modules()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_doors_that_stay_shut():
    config = config_for("llama")
    with pytest.raises(ValueError, match="uses shared state.*get_peft_model"):
        inject_adapter_in_model(config, tiny("llama"))
    with pytest.raises(ValueError, match="ASO_LORA.*not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny("llama"), config, mixed=True)
    model = get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("stock", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]


def test_hotswap_is_refused(tmp_path: Path):
    _, model = chain("llama")
    model.save_pretrained(tmp_path)
    before = state_of(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, tmp_path / "amazon", adapter_name=CURRENT)
    assert_same(model, before)


def test_an_adapter_that_others_are_built_on_cannot_be_deleted():
    _, model = chain("llama")
    before = state_of(model)
    with pytest.raises(HistoryError, match="'dbpedia' cannot be deleted: 'amazon', 'agnews' was trained on top"):
        model.delete_adapter("dbpedia")
    assert_same(model, before)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("imdb")


@pytest.mark.filterwarnings("ignore:The active adapter")
def test_deleting_from_the_end():
    base, model = chain("llama")
    model.delete_adapter(CURRENT)
    assert model.active_adapters == ["amazon"] == [model.active_adapter]
    assert_is_sum(model, base, HISTORY)
    assert_frozen(model, ["dbpedia"])
    assert all(parameter.requires_grad for parameter in parameters_of(model, "amazon").values())
    model.delete_adapter("amazon")
    assert_is_sum(model, base, ["dbpedia"])
    assert all(parameter.requires_grad for parameter in parameters_of(model, "dbpedia").values())
    model.add_adapter("yelp", config_for("llama"))
    assert model.peft_config["yelp"].history == ["dbpedia"]


def test_deleting_an_inactive_task_changes_nothing_else():
    base, model = chain("llama")
    model.set_adapter("amazon", inference_mode=True)
    model.delete_adapter(CURRENT)
    assert model.active_adapters == ["amazon"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_is_sum(model, base, HISTORY)


def test_deleting_while_merged_is_refused():
    _, model = chain("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter(CURRENT)
    assert model.get_model_status().merged_adapters == sorted(TASKS)


def test_what_a_variant_froze_is_frozen_again_when_its_dependents_are_gone():
    """MiCA trains A only. As history it is frozen whole, and trains A only again afterwards."""
    model = get_peft_model(tiny("llama"), config_for("llama", init_lora_weights="mica"), adapter_name="one")
    flags = {name: parameter.requires_grad for name, parameter in parameters_of(model, "one").items()}
    assert sorted(set(flags.values())) == [False, True]
    model.add_adapter("two", config_for("llama"))
    model.set_adapter("two")
    assert_frozen(model, ["one"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("two")
    assert {n: p.requires_grad for n, p in parameters_of(model, "one").items()} == flags


def test_a_second_wrapper_around_the_same_model_does_not_add_the_history_twice():
    base, model = chain("llama", TASKS[:2])
    with pytest.warns(UserWarning, match="a second time|Already found"):
        again = get_peft_model(model.get_base_model(), config_for("llama"), adapter_name=CURRENT)
    fill(again, [CURRENT])
    assert again.base_model.history == HISTORY
    assert_is_sum(again.eval(), base, TASKS)
