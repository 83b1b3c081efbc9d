"""Loading gives the model that was saved, as PEFT's own loader would; what does not fit leaves the base as it was."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_aso import (
    ASOLoraConfig,
    ChainError,
    HistoryError,
    export_merged,
    load_chain,
    load_history,
    save_chain,
    update_task,
)
from tests.chain.chains import (
    add,
    at_call,
    change_weights,
    check_same,
    edit,
    logits,
    make_chain,
    settings,
    stock_adapter,
    unchanged,
)
from tests.chain.test_files import check_refused
from tests.tiny_models import tiny
from tests.training.tools import QUICK, train

DATA = Path(__file__).parents[1] / "data"
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("own_saving", [True, False])
def test_loaded_is_saved(own_saving: bool, tmp_path: Path) -> None:
    model = make_chain(tasks={"first": {}, "second": {}, "third": {"history": ["first"]}})
    model.base_model.attribution["second"] = torch.randn(24)
    model.peft_config["second"].attribution_layout = [["model.layers.0.mlp.down_proj", 0, 24]]
    save_chain(model, tmp_path) if own_saving else model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_chain(tiny("llama"), tmp_path)
    assert loaded.active_adapters == ["third"] and list(loaded.peft_config) == ["first", "second", "third"]
    assert loaded.base_model.tasks.histories == model.base_model.tasks.histories
    assert loaded.base_model.attribution.keys() == {"second"}
    for task in ("first", "second", "third"):
        model.set_adapter(task)
        loaded.set_adapter(task)
        assert torch.equal(logits(loaded), logits(model))


def test_tasks_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    """The first two tasks are trained again, into the folder that has the third one of the first run."""
    make_chain(seed=1).save_pretrained(str(tmp_path))
    make_chain(tasks={"first": {}, "second": {}}, seed=2).save_pretrained(str(tmp_path))
    check_refused(tmp_path, "'third' was trained on top of 'first' with the sha256")
    model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "first"), adapter_name="first")
    model.load_adapter(str(tmp_path / "second"), adapter_name="second")
    with pytest.raises(HistoryError, match="'third' was trained on top of other weights of 'first'"):
        model.load_adapter(str(tmp_path / "third"), adapter_name="third")
    assert list(model.peft_config) == ["first", "second"]
    edit(tmp_path / "first", dict(lora_alpha=12))  # the weights are the same, the scale is not
    with pytest.raises(HistoryError, match="'second' was trained on top of other weights of 'first'"):
        model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "first"), adapter_name="first")
        model.load_adapter(str(tmp_path / "second"), adapter_name="second")


def test_the_folders_of_trainers_are_a_chain_and_changed_settings_are_named(tmp_path: Path) -> None:
    """One `save_model` a task, as a script for each task writes them; then the first one is trained again."""

    def run(task: str, number: int, **options: Any) -> Any:
        values = {"attribution": QUICK, **options}
        if task == "second":
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                model = load_chain(tiny("llama"), [tmp_path / "first"])
            add(model, task, **settings(**values))
        else:
            model = make_chain(tasks={task: values}, seed=number)
        model.train()
        train(model, tmp_path / task, max_steps=2, save_strategy="steps", save_steps=1).save_model()
        return model.eval()

    run("first", 1)
    model = run("second", 1, penalty_weight=0.5)
    folders = [tmp_path / "first", tmp_path / "second"]
    assert torch.equal(logits(load_chain(tiny("llama"), folders)), logits(model))
    other = load_chain(tiny("llama"), folders[:1])
    add(other, "second", **settings(attribution=QUICK, lora_alpha=7, penalty="l1", penalty_weight=0.25))
    changes = "lora_alpha was 6 and is 7.*penalty was 'squared' and is 'l1'.*penalty_weight was 0.5 and is 0.25"
    with pytest.warns(UserWarning, match=changes):
        train(other.train(), tmp_path / "second", max_steps=3, resume=str(tmp_path / "second" / "checkpoint-1"))
    run("first", 2)
    check_refused(folders, "'second' was trained on top of 'first' with the sha256")
    other = add(load_chain(tiny("llama"), folders[:1]), "second", **settings(attribution=QUICK, penalty_weight=0.5))
    with pytest.raises(ValueError, match="other weights of its history"):
        train(other.train(), tmp_path / "second", resume=str(tmp_path / "second" / "checkpoint-1"))


CHOICES: dict[str, list[list[str]]] = {
    "llama": [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "embed_tokens"], ["layers.1.self_attn.o_proj"]],
    "gpt2": [["c_attn"], ["c_attn", "wte"], ["c_fc"]],
    "t5": [["q", "v"], ["k", "wo"], ["shared", "q"]],
    "bert": [["query", "value"], ["word_embeddings", "key"], ["intermediate.dense"]],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("architecture", CHOICES)
def test_random_chains_are_what_peft_loads(architecture: str, tmp_path: Path, fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    tasks: dict[str, dict[str, Any]] = {}
    for index in range(5):
        targets = draw.choice(CHOICES[architecture])
        embeds = any(name in ("embed_tokens", "wte", "shared", "word_embeddings") for name in targets)
        tasks[f"task{index}"] = {
            "r": draw.randint(1, 5),
            "lora_alpha": draw.randint(1, 40),
            "target_modules": targets,
            "use_rslora": draw.random() < 0.5,
            "lora_bias": not embeds and draw.random() < 0.5,
            "lora_dropout": draw.choice([0.0, 0.25]),
            "rank_pattern": {targets[0]: 6} if draw.random() < 0.5 else {},
            "history": draw.choice([None, draw.sample(list(tasks), draw.randint(0, index))]),
            "modules_to_save": draw.choice([None, None, None, ["LayerNorm" if architecture == "bert" else "lm_head"]]),
            "task_type": None if architecture == "bert" else settings(architecture)["task_type"],
        }
    model = make_chain(architecture, tasks, seed=fresh_seed)
    save_chain(model, tmp_path)
    loaded = load_chain(tiny(architecture), tmp_path)
    first, *later = loaded.peft_config
    by_peft = PeftModel.from_pretrained(tiny(architecture), tmp_path / first, adapter_name=first)
    for task in later:
        by_peft.load_adapter(tmp_path / task, adapter_name=task)
    by_peft.set_adapter(later[-1], inference_mode=True)
    check_same(loaded, by_peft.eval())
    for task in tasks:
        loaded.set_adapter(task)
        model.set_adapter(task)
        torch.testing.assert_close(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.filterwarnings("ignore:.*than are saved now")
def test_dtypes(dtype: torch.dtype, autocast: bool, saved_dtype: torch.dtype, tmp_path: Path) -> None:
    save_chain(make_chain().to(saved_dtype), tmp_path)
    loaded = load_chain(tiny("llama").to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    for task in ("first", "second", "third"):
        held = load_file(tmp_path / task / SAFETENSORS_WEIGHTS_NAME)[KEY]
        weight = loaded.get_submodule(KEY.removesuffix(".weight"))[task].weight
        assert weight.dtype == (torch.float32 if autocast else dtype)
        assert torch.equal(weight, held.to(weight.dtype)), "not rounded to the base model's dtype on the way"


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_trainable_or_frozen(tmp_path: Path, architecture: str) -> None:
    make_chain(architecture).save_pretrained(str(tmp_path))
    model = load_chain(tiny(architecture), tmp_path)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = load_chain(tiny(architecture), tmp_path, trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("third" in name for name in trained)
    assert ("classifier.modules_to_save.third" in str(trained)) == (architecture == "bert")


def test_lists_tasks_and_names(folder: Path, tmp_path: Path) -> None:
    folders = [folder / "first", str(folder / "second"), folder / "third"]
    expected = logits(load_chain(tiny("llama"), folder))
    for given in (folders, folders[::-1]):
        assert torch.equal(logits(load_chain(tiny("llama"), given)), expected)
    model = load_chain(tiny("llama"), folder, tasks=["second"])
    assert list(model.peft_config) == ["first", "second"] and model.active_adapters == ["second"]
    named = make_chain(tasks={"default": {"task_name": "reviews"}, "second": {}})
    named.save_pretrained(str(tmp_path / "named"))
    assert (tmp_path / "named" / CONFIG_NAME).exists(), "PEFT saves this one in the folder itself"
    loaded = load_chain(tiny("llama"), tmp_path / "named")
    assert loaded.base_model.tasks.histories == {"reviews": (), "second": ("reviews",)}
    assert torch.equal(logits(loaded), logits(named))
    model = make_chain()
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mix", combination_type="cat")
    model.save_pretrained(str(tmp_path / "mix"))
    with pytest.warns(UserWarning, match="'mix'.*no tasks"):
        assert list(load_chain(tiny("llama"), tmp_path / "mix").peft_config) == ["first", "second", "third"]


def test_another_base_model(folder: Path, tmp_path: Path) -> None:
    shape = r"does not fit .*layers.0.self_attn.q_proj.lora_A.weight has the shape \(2, 16\) in the file and"
    check_refused(folder, rf"{shape} \(2, 32\) here", tiny("llama", hidden_size=32))
    check_refused(folder, "layers.2.self_attn.* in the file and None", tiny("llama", num_hidden_layers=2))
    check_refused(folder, "layers.3.self_attn.* None in the file", tiny("llama", num_hidden_layers=4))
    check_refused(folder, "does not fit this model", tiny("gpt2"))
    make_chain("bert").save_pretrained(str(tmp_path / "bert"))
    check_refused(
        tmp_path / "bert", r"classifier.bias has the shape \(3,\).*\(5,\).*num_labels", tiny("bert", num_labels=5)
    )
    edit(tmp_path / "bert" / "second", lambda weights: weights.pop("base_model.model.classifier.bias"))
    check_refused(tmp_path / "bert", "does not fit this model.*classifier.bias", tiny("bert"))
    for name in ("first", "second", "third"):
        edit(folder / name, dict(base_model_name_or_path="somebody/model"))
    for load, source in ((load_chain, folder), (load_history, folder / "first")):
        base = tiny("llama")
        base.name_or_path = "somebody/other-model"
        with pytest.warns(UserWarning, match="trained on 'somebody/model'.*'somebody/other-model'"):
            load(base, source)


LORA, SHAPES = "layers.1.self_attn.q_proj", r"has the shape \(2,\) in the file and None here"
MISFITS: list[tuple[str, Any, str]] = [
    ("third", lambda w: w.pop(KEY), f"no weights for .*{LORA}.lora_B"),
    ("first", lambda w: w.pop(KEY), f"{LORA}.lora_B.* None in the file"),
    ("third", lambda w: [w.pop(KEY), w.pop(KEY.replace("_B", "_A"))], f"no weights for 2 .*{LORA}"),
    ("third", lambda w: w.update({KEY: w[KEY][:, :1].contiguous()}), r"\(16, 1\) .*\(16, 2\)"),
    ("third", lambda w: w.update(stray=torch.zeros(2)), f"stray {SHAPES}"),
    ("third", lambda w: w.update(aso_attribution_vector=torch.zeros(4)), r"vector .* shape \(4,\)"),
    ("third", dict(target_modules=["q_proj"]), "v_proj.* is not in it"),
    ("third", dict(r=7), r"\(2, 16\) in the file, has shape \(7, 16\)"),
    ("third", dict(task_name="layers"), "cannot be called.*task_name in its adapter_config.json"),
    ("third", dict(task_name="first"), "Two folders hold a task called 'first'"),
    ("second", dict(use_dora=True), "'second' .* cannot be part of a chain of tasks: .*DoRA"),
    ("second", dict(bias="all"), "cannot be part of a chain of tasks: .*bias='all'"),
    ("second", dict(init_lora_weights="pissa"), "cannot be part of a chain of tasks: .*pissa"),
    ("second", dict(history=["third"]), "form a cycle: .*second -> third|third -> second"),
    ("second", dict(history=["zeroth"]), "'second' was trained on top of 'zeroth', which is not there"),
]


@pytest.mark.parametrize(("task", "change", "message"), MISFITS)
def test_weights_and_configs_that_do_not_fit(folder: Path, task: str, change: Any, message: str) -> None:
    edit(folder / task, change)
    for later in ("second", "third"):
        edit(folder / later, dict(history_hashes=None))  # which would be refused first
    check_refused(folder, message)


def test_models_and_tasks_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    model = make_chain()
    for base in (model, model.base_model.model):
        with pytest.raises(ChainError, match="has adapters already"):
            load_chain(base, folder)
    with pytest.raises(ChainError, match="no task 'fourth' here"):
        load_chain(tiny("llama"), folder, tasks=["fourth"])
    stock_adapter(tmp_path / "stock" / "one")
    check_refused(tmp_path / "stock", "stock LoRA adapter.*load_history")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 5, 11, 13, 20])
def test_an_error_half_way_leaves_the_model_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
) -> None:
    """PEFT makes A and B with nn.Linear; the first adapter and the later ones are loaded in two ways."""
    stock_adapter(tmp_path / "stock", target_modules=["q_proj", "k_proj"])
    base, model = tiny("llama"), make_chain()
    with unchanged(base), unchanged(model):
        loads = [lambda: load_chain(base, folder), lambda: load_history(model, tmp_path / "stock")]
        for load in loads if call <= 12 else loads[:1]:  # the second makes twelve layers
            with monkeypatch.context() as patch, pytest.raises(type(error)):
                at_call(patch, "torch.nn.Linear.__init__", call, Mock(side_effect=error))
                load()
    load_chain(base, folder)


def test_base_weights_in_the_file(tmp_path: Path) -> None:
    """PEFT saves an embedding's own weights with the adapter on it; they are compared, not loaded."""
    model = make_chain(tasks={"first": {"target_modules": ["q_proj", "embed_tokens"]}, "second": {}})
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(str(tmp_path))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "first" / SAFETENSORS_WEIGHTS_NAME)
    assert torch.equal(logits(load_chain(tiny("llama"), tmp_path)), logits(model))
    load_chain(tiny("llama").to(torch.bfloat16), tmp_path)  # the same values, rounded
    edit(tmp_path / "first", lambda weights: weights[key][0, 0].add_(1))
    check_refused(tmp_path, "has another .*embed_tokens.base_layer.weight than the base")
    edit(tmp_path / "first", lambda weights: weights.update({key: torch.zeros(70, 16)}))
    check_refused(tmp_path, "resize_token_embeddings")


def resized(tmp_path: Path, seed: int = 3, **config: Any) -> Any:
    """Six tokens more than the base model in the folder has, with random values."""
    tiny("llama", **config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(seed)
    model.resize_token_embeddings(model.config.vocab_size + 6, mean_resizing=False)
    return model


@pytest.mark.parametrize("heads", [["lm_head"], ["embed_tokens", "lm_head"], None])
def test_new_tokens_and_heads(tmp_path: Path, heads: list[str] | None) -> None:
    model = resized(tmp_path)
    for task in ("first", "second"):
        model = add(model, task, **settings(modules_to_save=heads))
    folder = save_chain(model, tmp_path / "chain")
    written = load_file(folder / "first" / SAFETENSORS_WEIGHTS_NAME)
    assert ("base_model.model.lm_head.modules_to_save.weight" in written) == bool(heads), "what this test is about"
    loaded = load_chain(resized(tmp_path), folder)
    for task in ("second", "first"):
        model.set_adapter(task)
        loaded.set_adapter(task)
        assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(resized(tmp_path))), "the base model is as it was"
    newer = add(resized(tmp_path), "first", **settings(modules_to_save=heads))
    save_chain(newer, tmp_path / "newer")
    update_task(loaded, "first", tmp_path / "newer")
    assert torch.equal(logits(loaded), logits(newer))


@pytest.mark.parametrize(("tied", "targets"), [(True, "q_proj"), (False, "q_proj"), (True, "embed_tokens")])
def test_new_tokens_have_the_values_that_were_trained_with(tmp_path: Path, tied: bool, targets: str) -> None:
    """Each call of `resize_token_embeddings` draws others; stock PEFT loads those of the file as well."""

    def base(seed: int = 3) -> Any:
        return resized(tmp_path, seed, tie_word_embeddings=tied)

    def of_new_tokens(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(torch.tensor([[3, 5, 66, 69]])).logits

    model = base()
    for task in ("first", "second", "third"):
        model = add(model, task, **settings(target_modules=[targets, "v_proj"]))
        model.peft_config[task].base_model_name_or_path = model.peft_config["first"].base_model_name_or_path
    folder = save_chain(model, tmp_path / "chain")
    assert (of_new_tokens(base(4)) - of_new_tokens(base())).abs().max() > 0.01, "what this test is about"
    assert torch.equal(of_new_tokens(load_chain(base(4), folder)), of_new_tokens(model))
    merged = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "merged"))
    torch.testing.assert_close(of_new_tokens(merged), of_new_tokens(model), atol=1e-4, rtol=1e-4)
    stock = get_peft_model(base(), LoraConfig(**settings(target_modules=[targets, "v_proj"])))
    stock.save_pretrained(tmp_path / "stock")
    assert torch.equal(of_new_tokens(PeftModel.from_pretrained(base(4), tmp_path / "stock")), of_new_tokens(stock))
    with pytest.raises(ChainError, match="resize_token_embeddings"):
        load_chain(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    (folder / "chain.json").unlink()
    for task, row in (("second", -1), ("first", 0)):  # the tasks share the new tokens, and the old ones are the base's
        edit(
            folder / task, lambda weights, row=row: weights[min(key for key in weights if "embed" in key)][row].add_(1)
        )
        check_refused(folder, f"'{task}' .* has another .*embed.* than the base model", base(4))
        edit(
            folder / task, lambda weights, row=row: weights[min(key for key in weights if "embed" in key)][row].sub_(1)
        )


def test_a_head_that_is_tied_to_an_embedding(tmp_path: Path) -> None:
    base, again = (tiny("llama", tie_word_embeddings=True) for _ in range(2))
    model = add(base, "first", **settings(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    assert torch.equal(logits(load_chain(again, save_chain(model, tmp_path))), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_stock_adapter_becomes_history(tmp_path: Path, architecture: str) -> None:
    ranks = {"value": 5, "v_proj": 5}
    stock = stock_adapter(tmp_path / "stock", architecture, use_rslora=True, r=3, rank_pattern=ranks)
    model = load_history(tiny(architecture), tmp_path / "stock", name="old")
    assert model.active_adapters == ["old"] and torch.equal(logits(model), logits(stock))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.peft_config["old"]
    assert isinstance(config, ASOLoraConfig) and (config.history, config.task_name, config.r) == ([], "old", 3)
    add(model, "new", **settings(architecture))
    assert model.base_model.tasks.histories["new"] == ("old",)
    loaded = load_chain(tiny(architecture), save_chain(model, tmp_path / "chain"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("training", [True, False])
def test_an_existing_model_goes_on_as_it_was(tmp_path: Path, architecture: str, training: bool) -> None:
    """Some of the modules have adapters already and some get their first; what trains goes on training."""

    def trained() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    targets = [*CHOICES[architecture][0], *CHOICES[architecture][2]]
    stock = stock_adapter(tmp_path / "stock", architecture, target_modules=targets, lora_dropout=0.5)
    model = make_chain(architecture)
    expected, before = logits(model), trained()
    model.train(training)
    model = load_history(model, tmp_path / "stock")
    assert model.active_adapters == ["third"] and {module.training for module in model.modules()} == {training}
    assert trained() == before != set()
    assert torch.equal(logits(model.eval()), expected)
    assert model.base_model.tasks.histories["third"] == ("first", "second")
    model.set_adapter("stock")
    assert torch.equal(logits(model), logits(stock))
    add(model, "next", **settings(architecture))
    assert model.base_model.tasks.histories["next"] == ("first", "second", "third", "stock")


def test_an_adapter_of_ours_has_its_history(folder: Path) -> None:
    model = load_chain(tiny("llama"), folder, tasks=["second"])
    model = load_history(model, folder / "third", name="renamed")
    assert model.base_model.tasks.histories["renamed"] == ("first", "second")
    model.set_adapter("renamed")
    assert torch.equal(logits(model), logits(load_chain(tiny("llama"), folder)))
    with pytest.raises(ChainError, match="'third' was trained on top of 'first', 'second', which the model"):
        load_history(tiny("llama"), folder / "third")
    with pytest.raises(ChainError, match="'third' was trained on top of 'first' with the sha256"):
        load_history(make_chain(tasks={"first": {}, "second": {}}, seed=9), folder / "third")


def test_adapters_that_cannot_become_history(tmp_path: Path) -> None:
    def attention() -> nn.Module:
        return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, bias=False), "head": nn.Linear(8, 2)})

    stock = stock_adapter(tmp_path / "stock")
    stock_adapter(tmp_path / "rows")
    edit(tmp_path / "rows", dict(trainable_token_indices=[3]))
    get_peft_model(attention(), LoraConfig(r=2, target_modules=["attention"])).save_pretrained(str(tmp_path / "torch"))
    get_peft_model(tiny("bert", num_labels=5), LoraConfig(**settings("bert"))).save_pretrained(str(tmp_path / "five"))
    for model, folder, name, message in (
        (make_chain(), "stock", "first", "a task called 'first' already"),
        (make_chain(), "stock", "../x", "cannot be the name of a task"),
        (stock, "stock", None, "adapters of another kind"),
        (tiny("llama"), "rows", None, "cannot be part of a chain of tasks: .*trained embedding rows"),
        (make_chain("bert"), "five", None, "classifier.bias has the shape"),
        (attention(), "torch", None, "MultiheadAttention, which cannot be part of a chain"),
    ):
        with unchanged(model), pytest.raises(ChainError, match=message):
            load_history(model, tmp_path / folder, name=name)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "chain_v1", tmp_path / "chain"))


def test_a_chain_in_the_first_format_has_the_same_logits_and_is_saved_anew(old: Path) -> None:
    expected = load_file(DATA / "chain_v1_logits.safetensors")
    for task in ("first", "second", "third"):
        model = load_chain(tiny("llama"), old, tasks=[task])
        torch.testing.assert_close(logits(model), expected[task], atol=1e-5, rtol=1e-5)
    assert model.base_model.soft_coefficients == {"first": 0.625, "second": 1.125}
    assert [vector.shape for vector in model.base_model.attribution.values()] == [(72,)] * 3
    save_chain(model, old)
    content = json.loads((old / "chain.json").read_text())
    assert content["format_version"] == 2 and not any("scale" in entry for entry in content["tasks"])
    assert torch.equal(logits(load_chain(tiny("llama"), old)), logits(model))


def test_hashes_and_scales_of_the_first_format_are_checked_and_a_newer_one_is_refused(old: Path) -> None:
    edit(old / "second", dict(lora_alpha=9))
    with pytest.raises(ChainError, match="'second'.*another scale.*'lora_alpha': 9"):
        load_chain(tiny("llama"), old)
    edit(old / "second", dict(lora_alpha=8))
    change_weights(old / "second")
    with pytest.raises(ChainError, match="'second'.*other weights"):
        load_chain(tiny("llama"), old)
    with pytest.warns(UserWarning, match="'second'.*other weights"):
        load_chain(tiny("llama"), old, strict=False)
    path = old / "chain.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 3'))
    with pytest.raises(ChainError, match="format version 3.*[Uu]pgrade"):
        load_chain(tiny("llama"), old)
