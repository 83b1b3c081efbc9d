"""Loading a chain gives the model that was saved; whatever cannot be loaded leaves the base model
untouched.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso import ASOLoraConfig, load_chain, load_history
from peft_aso.chain import ChainError, loading, save_chain
from peft_aso.tuner import bulk
from tests.chain.chains import logits, make_chain, randomize, settings, stock_adapter
from tests.tiny_models import tiny

MIXED: dict[str, dict[str, Any]] = {
    "first": {"r": 3, "use_rslora": True},
    "second": {"r": 2, "lora_alpha": 9},
    "third": {"r": 4, "history": ["first"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_chain().save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "chain"))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" in name or ".modules_to_save." in name
    }


def check_refused(base: Any, source: Any, message: str, **options: Any) -> None:
    """The error is raised and the base model has not changed at all."""
    names = [(name, type(module)) for name, module in base.named_modules()]
    values = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in base.named_parameters()}
    with pytest.raises(ChainError, match=message):
        load_chain(base, source, **options)
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    for name, tensor in base.named_parameters():
        assert torch.equal(tensor, values[name][0])
        assert tensor.requires_grad == values[name][1]
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("own_saving", [True, False])
def test_loaded_is_saved(architecture: str, own_saving: bool, tmp_path: Path) -> None:
    model = make_chain(architecture, MIXED)
    if own_saving:
        save_chain(model, tmp_path)
    else:
        model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_chain(tiny(architecture), tmp_path)
    assert loaded.active_adapters == ["third"]
    assert list(loaded.peft_config) == ["first", "second", "third"]
    assert loaded.base_model.tasks.histories == model.base_model.tasks.histories
    expected = adapter_weights(model)
    found = adapter_weights(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for task in MIXED:
        model.set_adapter(task)
        loaded.set_adapter(task)
        assert torch.equal(logits(loaded), logits(model))


def test_eval_and_frozen_unless_trainable(folder: Path) -> None:
    model = load_chain(tiny("llama"), folder)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = load_chain(tiny("llama"), folder, trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".third." in name for name in trained)


def test_trainable_head(tmp_path: Path) -> None:
    make_chain("bert").save_pretrained(str(tmp_path))
    model = load_chain(tiny("bert"), tmp_path, trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("third" in name for name in trained)
    assert any("classifier.modules_to_save.third" in name for name in trained)


def test_list_of_folders_and_chosen_tasks(folder: Path) -> None:
    folders = [folder / "first", str(folder / "second"), folder / "third"]
    expected = logits(load_chain(tiny("llama"), folder))
    assert torch.equal(logits(load_chain(tiny("llama"), folders)), expected)
    assert torch.equal(logits(load_chain(tiny("llama"), folders[::-1])), expected)
    model = load_chain(tiny("llama"), folder, tasks=["second"])
    assert list(model.peft_config) == ["first", "second"]
    assert model.active_adapters == ["second"]


def test_default_adapter_in_the_root(tmp_path: Path) -> None:
    model = make_chain(tasks={"default": {}, "second": {}})
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / CONFIG_NAME).exists()
    loaded = load_chain(tiny("llama"), tmp_path)
    assert list(loaded.peft_config) == ["default", "second"]
    assert torch.equal(logits(loaded), logits(model))


def test_task_name_counts_not_the_adapters_name(tmp_path: Path) -> None:
    model = make_chain(tasks={"default": {"task_name": "reviews"}, "second": {}})
    model.save_pretrained(str(tmp_path))
    loaded = load_chain(tiny("llama"), tmp_path)
    assert list(loaded.peft_config) == ["reviews", "second"]
    assert loaded.base_model.tasks.histories["second"] == ("reviews",)


def test_attribution_vectors_come_along(tmp_path: Path) -> None:
    model = make_chain()
    vector = torch.randn(24)
    model.base_model.attribution["second"] = vector
    model.peft_config["second"].attribution_layout = [["model.layers.0.mlp.down_proj", 0, 24]]
    model.save_pretrained(str(tmp_path))
    loaded = load_chain(tiny("llama"), tmp_path)
    assert loaded.base_model.attribution.keys() == {"second"}
    assert torch.equal(loaded.base_model.attribution["second"], vector)


def test_half_precision(tmp_path: Path) -> None:
    model = make_chain().to(torch.bfloat16)
    model.save_pretrained(str(tmp_path))
    half = load_chain(tiny("llama").to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    cast = load_chain(tiny("llama").to(torch.bfloat16), tmp_path)
    for loaded, dtype in ((half, torch.bfloat16), (cast, torch.float32)):
        found = adapter_weights(loaded)
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        assert all(torch.equal(found[k], v.to(dtype)) for k, v in adapter_weights(model).items())


def test_saving_over_the_loaded_folder(folder: Path) -> None:
    model = load_chain(tiny("llama"), folder)
    before = adapter_weights(model)
    model.save_pretrained(str(folder))
    again = adapter_weights(load_chain(tiny("llama"), folder))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_random_state_is_left_alone(folder: Path) -> None:
    base = tiny("llama")
    state = torch.get_rng_state()
    load_chain(base, folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_only_for_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chain(tasks={f"task{index}": {} for index in range(5)}).save_pretrained(str(tmp_path))
    capsys.readouterr()
    load_chain(tiny("llama"), tmp_path, tasks=["task3"])
    assert "Loading tasks" not in capsys.readouterr().err
    load_chain(tiny("llama"), tmp_path)
    assert "Loading tasks" in capsys.readouterr().err


# ---- what is refused, with the base model untouched ------------------------------------------------------


def test_base_with_adapters(folder: Path) -> None:
    model = make_chain()
    with pytest.raises(ChainError, match="has adapters already"):
        load_chain(model, folder)
    with pytest.raises(ChainError, match="has adapters already"):
        load_chain(model.base_model.model, folder)


@pytest.mark.parametrize("spoilt", ["first", "third"])
def test_damage_anywhere_is_found_first(folder: Path, spoilt: str) -> None:
    path = folder / spoilt / SAFETENSORS_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-8])
    check_refused(tiny("llama"), folder, "truncated or damaged")


def test_another_size(folder: Path) -> None:
    base = tiny("llama", hidden_size=32)
    check_refused(base, folder, "layers.0.self_attn.q_proj maps 16 to 16 .* and 32 to 32 in the model")


def test_another_depth_and_architecture(folder: Path) -> None:
    check_refused(tiny("llama", num_hidden_layers=2), folder, "no module 'model.layers.2.self_attn.")
    check_refused(tiny("llama", num_hidden_layers=4), folder, "no weights for model.layers.3.self_attn.q_proj")
    check_refused(tiny("gpt2"), folder, "no module 'model.layers.0.self_attn")


def test_another_number_of_classes(tmp_path: Path) -> None:
    make_chain("bert").save_pretrained(str(tmp_path))
    check_refused(tiny("bert", num_labels=5), tmp_path, r"classifier.bias has shape \(3,\).*\(5,\).*num_labels")


def test_missing_head(tmp_path: Path) -> None:
    make_chain("bert").save_pretrained(str(tmp_path))
    edit_weights(tmp_path / "second", lambda weights: weights.pop("base_model.model.classifier.bias"))
    check_refused(tiny("bert"), tmp_path, "'second' lacks classifier.bias.*modules_to_save")


def test_incomplete_weights(folder: Path) -> None:
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_weights(folder / "second", lambda weights: weights.pop(key))
    check_refused(tiny("llama"), folder, "lacks one of the two matrices of model.layers.1.self_attn.q_proj")
    edit_weights(folder / "second", lambda weights: weights.pop(key.replace("lora_B", "lora_A")))
    check_refused(tiny("llama"), folder, "no weights for model.layers.1.self_attn.q_proj")


def test_ranks_that_do_not_meet(folder: Path) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
        weights[key] = weights[key][:, :1].contiguous()

    edit_weights(folder / "second", cut)
    check_refused(tiny("llama"), folder, "have different ranks")


def test_weights_beyond_the_config(folder: Path) -> None:
    edit_config(folder / "second", target_modules=["q_proj"])
    check_refused(tiny("llama"), folder, "v_proj, which its config does not name")


def test_no_lora_matrices(folder: Path) -> None:
    save_file({"something": torch.zeros(2)}, folder / "second" / SAFETENSORS_WEIGHTS_NAME)
    check_refused(tiny("llama"), folder, "holds no LoRA matrices")


def test_stray_tensor(folder: Path) -> None:
    edit_weights(folder / "second", lambda weights: weights.update(stray=torch.zeros(2)))
    check_refused(tiny("llama"), folder, "'stray' that belongs to nothing")


def test_rank_that_the_config_denies(folder: Path) -> None:
    edit_config(folder / "third", r=7)
    base = tiny("llama")
    before = logits(base)
    with pytest.raises(ChainError, match="rank 2 in the file of 'third' and 7 in its config"):
        load_chain(base, folder)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base), before)
    edit_config(folder / "third", r=2)
    load_chain(base, folder)


def test_histories(folder: Path) -> None:
    shutil.rmtree(folder / "first")
    check_refused(tiny("llama"), folder, "'second' was trained on top of 'first', which is not here")
    edit_config(folder / "second", history=["third"])
    edit_config(folder / "third", history=["second"])
    check_refused(tiny("llama"), folder, "form a cycle")


def test_one_task_twice(folder: Path) -> None:
    shutil.copytree(folder / "first", folder / "copy")
    check_refused(tiny("llama"), folder, "Two folders hold a task called 'first'")


def test_names_of_model_parts(folder: Path) -> None:
    for name in ("layers", "a.b"):
        edit_config(folder / "third", task_name=name)
        check_refused(tiny("llama"), folder, "cannot be called.*change task_name in its adapter_config.json")


def test_stock_adapter_in_the_folder(folder: Path) -> None:
    stock_adapter(folder / "plain")
    check_refused(tiny("llama"), folder, "stock LoRA adapter.*load_history")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_cannot_be_summed(folder: Path, values: dict[str, Any], message: str) -> None:
    edit_config(folder / "second", **values)
    check_refused(tiny("llama"), folder, f"'second' .* cannot be part of a chain of tasks: .*{message}")


def test_unknown_task_and_source(folder: Path) -> None:
    check_refused(tiny("llama"), folder, "no task 'fourth' here", tasks=["fourth"])
    check_refused(tiny("llama"), "somebody/chain", "There is no folder 'somebody/chain'.*not in the cache")


def test_combined_adapters_are_left_out(tmp_path: Path) -> None:
    model = make_chain()
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mix", combination_type="cat")
    model.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="'mix'.*no tasks"):
        loaded = load_chain(tiny("llama"), tmp_path)
    assert list(loaded.peft_config) == ["first", "second", "third"]


def test_other_base_model_by_name(folder: Path) -> None:
    for name in ("first", "second", "third"):
        edit_config(folder / name, base_model_name_or_path="somebody/model")
    base = tiny("llama")
    base.name_or_path = "somebody/other-model"
    with pytest.warns(UserWarning, match="trained on 'somebody/model'.*'somebody/other-model'"):
        load_chain(base, folder)
    base = tiny("llama")
    base.name_or_path = "somebody/other-model"
    with pytest.warns(UserWarning, match="trained on 'somebody/model'.*'somebody/other-model'"):
        load_history(base, folder / "first")


def test_base_weights_in_the_file(tmp_path: Path) -> None:
    """PEFT saves an embedding's own weights beside the adapter on it; they are compared, not loaded."""
    tasks: dict[str, dict[str, Any]] = {"first": {"target_modules": ["q_proj", "embed_tokens"]}, "second": {}}
    model = make_chain(tasks=tasks)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(str(tmp_path))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "first" / SAFETENSORS_WEIGHTS_NAME)
    assert torch.equal(logits(load_chain(tiny("llama"), tmp_path)), logits(model))
    half = load_chain(tiny("llama").to(torch.bfloat16), tmp_path)  # the same values, rounded
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16

    def other(weights: dict[str, torch.Tensor]) -> None:
        weights[key][0, 0] += 1

    edit_weights(tmp_path / "first", other)
    check_refused(tiny("llama"), tmp_path, "brings its own model.embed_tokens.weight, and it differs")

    def longer(weights: dict[str, torch.Tensor]) -> None:
        weights[key] = torch.zeros(70, 16)

    edit_weights(tmp_path / "first", longer)
    check_refused(tiny("llama"), tmp_path, r"resize_token_embeddings\(70\)")


# ---- load_history ----------------------------------------------------------------------------------------


def test_stock_adapter_becomes_history_of_a_bare_model(tmp_path: Path) -> None:
    plain = stock_adapter(tmp_path / "plain", use_rslora=True, r=3, rank_pattern={"v_proj": 5})
    base = tiny("llama")
    model = load_history(base, tmp_path / "plain", name="old")
    assert isinstance(model, PeftModel)
    assert model.active_adapters == ["old"]
    assert torch.equal(logits(model), logits(plain))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.peft_config["old"]
    assert isinstance(config, ASOLoraConfig)
    assert (config.history, config.task_name, config.use_rslora) == ([], "old", True)
    assert (config.r, config.rank_pattern) == (3, {"v_proj": 5})
    model.add_adapter("new", ASOLoraConfig(**settings("llama")))
    assert model.base_model.tasks.histories["new"] == ("old",)
    randomize(model, "new")
    model.set_adapter("new")
    model.save_pretrained(str(tmp_path / "chain"))
    assert torch.equal(logits(load_chain(tiny("llama"), tmp_path / "chain")), logits(model.eval()))


@pytest.mark.parametrize("training", [True, False])
def test_existing_model_goes_on_as_it_was(tmp_path: Path, training: bool) -> None:
    stock_adapter(tmp_path / "plain", lora_dropout=0.5)
    model = make_chain("llama").train(training)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values())
    expected = logits(model.eval())
    model.train(training)
    model = load_history(model, tmp_path / "plain")
    assert model.active_adapters == ["third"]
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(logits(model.eval()), expected)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(after[name] == value for name, value in before.items())
    assert not any(value for name, value in after.items() if ".plain." in name)
    assert model.base_model.tasks.histories["third"] == ("first", "second")
    model.add_adapter("next", ASOLoraConfig(**settings("llama")))
    assert model.base_model.tasks.histories["next"] == ("first", "second", "third", "plain")


def test_stock_classifier_with_head(tmp_path: Path) -> None:
    plain = stock_adapter(tmp_path / "plain", "bert")
    model = load_history(tiny("bert"), tmp_path / "plain")
    assert torch.equal(logits(model), logits(plain))
    both = load_history(make_chain("bert"), tmp_path / "plain")
    both.set_adapter("plain")
    assert torch.equal(logits(both), logits(plain))


def test_own_adapter_keeps_its_history(folder: Path) -> None:
    model = load_chain(tiny("llama"), folder, tasks=["second"])
    model = load_history(model, folder / "third", name="renamed")
    assert model.base_model.tasks.histories["renamed"] == ("first", "second")
    model.set_adapter("renamed")
    assert torch.equal(logits(model), logits(load_chain(tiny("llama"), folder)))
    with pytest.raises(ChainError, match="'third' was trained on top of 'first', 'second', which the model"):
        load_history(tiny("llama"), folder / "third")


def test_names_that_are_taken_or_bad(tmp_path: Path) -> None:
    stock_adapter(tmp_path / "plain")
    model = make_chain()
    with pytest.raises(ChainError, match="a task called 'first' already"):
        load_history(model, tmp_path / "plain", name="first")
    with pytest.raises(ChainError, match="cannot be called 'layers'"):
        load_history(model, tmp_path / "plain", name="layers")
    with pytest.raises(ChainError, match="cannot be the name of a task"):
        load_history(model, tmp_path / "plain", name="../x")


def test_models_of_another_kind(tmp_path: Path) -> None:
    stock = stock_adapter(tmp_path / "plain")
    for model in (stock, stock.base_model.model):
        with pytest.raises(ChainError, match="adapters of another kind"):
            load_history(model, tmp_path / "plain")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"trainable_token_indices": [3]}, "trained embedding rows"),
    ],
)
def test_stock_adapters_that_cannot_join(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    stock_adapter(tmp_path / "plain", **overrides)
    base = tiny("llama")
    with pytest.raises(ChainError, match=f"cannot be part of a chain of tasks: .*{message}"):
        load_history(base, tmp_path / "plain")
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_misfit_leaves_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_adapter(tmp_path / "plain")
    small = make_chain("llama", hidden_size=32)
    with pytest.raises(ChainError, match="maps 16 to 16"):
        load_history(small, tmp_path / "plain")
    model = make_chain()
    expected = logits(model)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loading, "set_peft_model_state_dict", broken)
    monkeypatch.setattr(bulk, "_placed", broken)
    for one_by_one in (False, True):
        if one_by_one:
            monkeypatch.setattr(loading, "fits_bulk", lambda adapter: False)
        with pytest.raises(RuntimeError, match="out of memory"):
            load_history(model, tmp_path / "plain")
        assert list(model.peft_config) == ["first", "second", "third"]
        assert torch.equal(logits(model), expected)
        base = tiny("llama")
        with pytest.raises(RuntimeError, match="out of memory"):
            load_history(base, tmp_path / "plain")
        assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_view_of_a_model_with_heads_and_adapters(tmp_path: Path) -> None:
    """A second adapter is checked against the model as it was before the first one."""
    stock_adapter(tmp_path / "plain", "bert", target_modules=["query", "dense"])
    model = load_history(make_chain("bert"), tmp_path / "plain")
    assert "plain" in model.peft_config
    other = get_peft_model(tiny("bert", num_labels=5), LoraConfig(**settings("bert")))
    other.save_pretrained(str(tmp_path / "five"))
    with pytest.raises(ChainError, match="classifier.bias has shape"):
        load_history(model, tmp_path / "five")
