"""Exports have the logits of the chain: a stock LoRA adapter in a process without this package, and a merged model."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_aso import ChainError, HistoryError, MissingHistoryError, export_lora, export_merged, save_chain
from peft_aso.chain.export import exact_targets
from peft_aso.tuner.low_rank import MERGES, LowRank, register_merge, sum_updates
from tests.chain.chains import TASK_TYPES, add, at_call, content, logits, make_chain
from tests.tiny_models import tiny, tiny_batch

Tasks = dict[str, dict[str, Any]]
# named by the architecture: what differs from task to task, and which extra layers each has
CASES: dict[str, Tasks] = {
    "llama": {
        "first": {"r": 2, "lora_alpha": 7, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
        "second": {"r": 3, "use_rslora": True, "target_modules": ["v_proj", "down_proj", "lm_head"]},
        "third": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    },
    "llama bias": {"first": {"lora_bias": True}, "second": {}},
    "llama embedding": {"first": {"target_modules": ["embed_tokens", "q_proj"], "r": 3}, "second": {}},
    "gpt2": {"first": {"r": 3}, "second": {"target_modules": ["mlp.c_proj", "c_attn"], "use_rslora": True}},
    "gpt2 embeddings": {
        "first": {"target_modules": ["wte", "c_attn"]},
        "second": {"target_modules": ["wte"], "fan_in_fan_out": False},
    },
    "t5": {
        "first": {},
        "second": {"target_modules": r"decoder\..*EncDecAttention\.(q|k)", "r": 3},
        "third": {"target_modules": ["wo"], "lora_alpha": 1},
    },
    "bert": {"first": {}, "second": {"r": 3, "target_modules": ["query", "output.dense"]}},
}
EXPORTS = pytest.mark.parametrize("export", [export_lora, export_merged])
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save of")


def test_stock_peft_gives_the_same_logits_in_a_process_of_its_own(tmp_path: Path) -> None:
    models = {}
    for case, tasks in CASES.items():
        folder, architecture = tmp_path / case, case.split()[0]
        overrides = {"attention_bias": True} if case == "llama bias" else {}
        base = tiny(architecture, **overrides)
        base.save_pretrained(folder)
        torch.save(tiny_batch(base, seed=3), folder / "batch.pt")
        models[case] = make_chain(architecture, tasks, **overrides)
        export_lora(models[case], folder / "served")
    command = [sys.executable, str(Path(__file__).with_name("stock_process.py")), *CASES]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for case, found in torch.load(tmp_path / "results.pt", weights_only=True).items():
        model = models.pop(case)
        ours = logits(model)
        with model.disable_adapter():
            assert (logits(model) - ours).abs().max() > 1e-2, "the adapters matter"
        # a folded history rounds the sum of weight and adapters: 1e-5 of the largest logit, not of each
        torch.testing.assert_close(found["logits"], ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
        layers, tasks = model.base_model.lora_layers(), CASES[case]
        rank = max(sum(layer.r[name] for name in tasks if name in layer.scaling) for layer in layers.values())
        assert found["warnings"] == [] and found["modules"] == sorted(layers), case
        assert (found["scales"], found["ranks"], found["peft_type"]) == ([1.0], [rank], "LORA"), case
    assert not models


def load_stock(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny("llama"), str(folder)).eval()


def test_config_is_stock(tmp_path: Path) -> None:
    model = make_chain("llama", CASES["llama"])
    model.peft_config["third"].base_model_name_or_path = "somebody/model"
    folder = export_lora(model, tmp_path / "served")
    values = json.loads((folder / CONFIG_NAME).read_text())
    assert values.keys() == LoraConfig().to_dict().keys()
    assert (values["r"], values["layers_to_transform"]) == (9, None)
    assert (values["task_type"], values["base_model_name_or_path"]) == ("CAUSAL_LM", "somebody/model")
    text = (folder / "README.md").read_text()
    assert "- rank 9, alpha 9" in text and "first, second, third" in text and "--max-lora-rank 16" in text
    untyped = export_lora(make_chain("bert", tasks={"first": {}, "second": {"task_type": None}}), tmp_path / "untyped")
    assert json.loads((untyped / CONFIG_NAME).read_text())["auto_mapping"]["base_model_class"].startswith("Bert")


def test_chosen_tasks_come_without_their_history(tmp_path: Path) -> None:
    model = make_chain(tasks={"default": {"task_name": "reviews"}, "second": {}, "third": {}})
    for layer in model.base_model.lora_layers().values():
        layer.set_scale("second", 0.5)
    export_lora(model, tmp_path / "one", tasks=["second"])
    with model.base_model.only("second"):
        torch.testing.assert_close(logits(load_stock(tmp_path / "one")), logits(model))
    export_lora(model, tmp_path / "two", tasks=["third", "reviews"])
    two = load_stock(tmp_path / "two").merge_and_unload()
    name, layer = next(iter(model.base_model.lora_layers().items()))
    expected = layer.get_base_layer().weight + delta_of(layer, ["third", "default"]).float()
    torch.testing.assert_close(two.get_submodule(name).weight, expected)


@torch.no_grad()
def delta_of(layer: Any, tasks: Any) -> torch.Tensor:
    """The sum of scale * B @ A, in double precision."""
    parts = [(layer.scaling[task], layer.lora_B[task], layer.lora_A[task]) for task in tasks if task in layer.scaling]
    return torch.stack([scale * B.weight.double() @ A.weight.double() for scale, B, A in parts]).sum(0)


@pytest.mark.parametrize("max_rank", [1, 3, 6])
def test_max_rank_is_the_best_of_that_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture, max_rank: int) -> None:
    model = make_chain("llama", CASES["llama"])
    with caplog.at_level(logging.WARNING, logger="peft_aso"):
        export_lora(model, tmp_path, max_rank=max_rank)
    weights, bounds, norms = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME), {}, {}
    for name, layer in model.base_model.lora_layers().items():
        delta = delta_of(layer, model.peft_config)
        down, up = (weights[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert down.shape[0] == up.shape[1] == max_rank
        bounds[name] = float(torch.linalg.svdvals(delta)[max_rank:].square().sum().sqrt())
        norms[name] = float(torch.linalg.matrix_norm(delta))
        error = float(torch.linalg.matrix_norm(up @ down - delta))
        assert error == pytest.approx(bounds[name], abs=2e-6 * norms[name])
    total = math.hypot(*bounds.values()) / math.hypot(*norms.values())
    worst = max(bounds[name] / norms[name] for name in bounds)
    stated = f"{total:.2e} over all weights, {worst:.2e} at worst"
    assert f"rank {max_rank} instead of 9: relative error {stated}" in caplog.text
    assert stated in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_half_precision(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = make_chain().to(torch.bfloat16)
    export_lora(model, tmp_path, dtype=dtype)
    weights = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {dtype or torch.bfloat16}
    name, layer = next(iter(model.base_model.lora_layers().items()))
    delta = delta_of(layer, model.peft_config)
    down, up = (weights[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    # alpha / r = 3, folded into B: bfloat16 rounds it
    error = float(torch.linalg.matrix_norm(up @ down - delta) / torch.linalg.matrix_norm(delta))
    assert error < (1e-7 if dtype == torch.float32 else 2**-8)


def test_convolutions(tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(3, 5, 3, padding=1)))

    model = add(add(base(), "first", r=2, target_modules=["conv"]), "second", r=3, target_modules=["conv"])
    x = torch.randn(2, 3, 6, 6)
    stock = PeftModel.from_pretrained(base(), str(export_lora(model, tmp_path / "exact"))).eval()
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-5)
    weights = load_file(export_lora(model, tmp_path / "short", max_rank=4) / SAFETENSORS_WEIGHTS_NAME)
    assert weights["base_model.model.conv.lora_A.weight"].shape == (4, 3, 3, 3)


def test_a_registered_merge_is_what_is_exported(tmp_path: Path) -> None:
    @register_merge("half of the sum")
    def half(updates: Any, psi: Any) -> LowRank:
        return replace(sum_updates(updates), scale=0.5)

    try:
        model = make_chain(tasks={"first": {}, "second": {"merge": "half of the sum"}})
        stock = load_stock(export_lora(model, tmp_path / "lora"))
        merged = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "merged"))
    finally:
        del MERGES["half of the sum"]
    torch.testing.assert_close(logits(stock), logits(merged), rtol=1e-4, atol=1e-4)
    name, layer = next(iter(model.base_model.lora_layers().items()))
    expected = layer.get_base_layer().weight + delta_of(layer, ["first", "second"]).float() / 2
    torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_target_modules_match_just_the_wanted_modules() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "x.h.0.mlp.c_proj", "head"]
    for wanted, expected in (
        (names[:5], ["c_proj"]),
        (["h.1.mlp.c_proj", "head"], ["h.1.mlp.c_proj", "head"]),
        # a full name that is the ending of another one: only an expression tells them apart
        (["h.0.mlp.c_proj"], r"h\.0\.mlp\.c_proj"),
    ):
        assert exact_targets(wanted, ["", *names], LoraConfig()) == expected
    with pytest.raises(ChainError, match=r"adapter on head, .*modules_to_save=\['head'\]"):
        exact_targets(["head", "h.1.mlp.c_proj"], names, LoraConfig(modules_to_save=["head"]))


@pytest.mark.parametrize("architecture", TASK_TYPES)
def test_a_merged_model_has_the_logits_of_the_chain(tmp_path: Path, architecture: str) -> None:
    model = make_chain(architecture)
    model.config.quantization_config = {"quant_method": "gguf"}  # of the file that the base was read from
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tasks, running in ((None, model.base_model.through("third")), (["third"], model.base_model.only("third"))):
        folder = export_merged(model, tmp_path / "out", tasks=tasks, max_shard_size="20KB" if tasks is None else "5GB")
        assert (len(list(folder.glob("*.safetensors*"))) > 1) == (tasks is None), "shards of an earlier export go"
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        with running:
            found = type(tiny(architecture)).from_pretrained(folder)
            torch.testing.assert_close(logits(found), logits(model), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "not touched"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_a_half_precision_base_is_rounded_once(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = make_chain(tasks={"first": {}, "second": {"r": 3, "lora_alpha": 4}, "third": {}})
    model.base_model.model.to(torch.bfloat16)
    folder = export_merged(model, tmp_path, tasks=["first", "third"], dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.bfloat16}
    for name, layer in model.base_model.lora_layers().items():
        exact = layer.get_base_layer().weight.detach().double() + delta_of(layer, ["first", "third"])
        expected = exact.float().to(dtype or torch.bfloat16)
        torch.testing.assert_close(loaded.get_submodule(name).weight, expected, atol=1e-6, rtol=1e-6)


def test_tied_weights_of_which_one_was_adapted_come_apart(tmp_path: Path) -> None:
    for targets, tied in ((["q_proj"], True), (["embed_tokens"], False)):
        model = make_chain(tasks={"first": {"target_modules": targets}}, tie_word_embeddings=True)
        folder = export_merged(model, tmp_path / str(tied))
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


@EXPORTS
def test_what_cannot_be_exported(tmp_path: Path, export: Any) -> None:
    head: Tasks = {"first": {"target_modules": ["gate_proj"]}, "second": {"modules_to_save": ["mlp"]}}
    bias: Tasks = {"first": {"lora_bias": True}, "second": {"target_modules": ["embed_tokens"]}}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny("llama"), {}, "needs a PeftModel with ASO_LORA"),
        (make_chain(tasks={"first": {"use_dora": True}}), {}, "'first' cannot be part of the sum: .*DoRA"),
        (make_chain(tasks=bias, attention_bias=True), {}, "lora_bias and model.embed_tokens is an embedding"),
        *((make_chain(), {"tasks": tasks}, "give each task once") for tasks in (["fourth"], [], ["first", "first"])),
        (make_chain(), {"dtype": torch.int8}, "torch.int8 is not a floating point type"),
    ]
    if export is export_lora:
        cases += [(make_chain(), {"max_rank": rank}, f"max_rank={rank} must be an integer") for rank in (0, 2.5)]
        cases.append((make_chain(tasks=head), {}, "modules_to_save=.*'mlp'"))
    else:
        merged = make_chain()
        merged.merge_adapter()
        cases.append((merged, {}, r"merged into .* already. Call model.unmerge_adapter\(\) first"))
    for value, dtype in ((float("nan"), None), (1e9, torch.float16)):
        model = make_chain()
        with torch.no_grad():
            model.base_model.lora_layers()["model.layers.1.self_attn.q_proj"].lora_A["first"].weight[0, 0] = value
        cases.append((model, {"dtype": dtype}, "model.layers.1.self_attn.q_proj.* NaN or Inf.*torch.float32"))
    for model, options, message in cases:
        with pytest.raises(ChainError, match=message):
            export(model, tmp_path / "out", **options)
    make_chain().save_pretrained(str(tmp_path / "chain"))
    with pytest.warns(UserWarning, match="not loaded yet"):
        model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "chain" / "second"))
    with pytest.raises((MissingHistoryError, HistoryError), match="'first'"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "alone", tasks=["second"])


@EXPORTS
def test_folders_of_somebody_else(tmp_path: Path, export: Any) -> None:
    model = make_chain()
    save_chain(model, tmp_path / "chain")
    make_chain(tasks={"default": {}}).save_pretrained(str(tmp_path / "adapter"))
    tiny("llama").save_pretrained(tmp_path / "model")
    for name in ("chain", "adapter", "model"):
        before = content(tmp_path / name)
        with pytest.raises(ChainError, match="holds a chain, an adapter or a model"):
            export(model, tmp_path / name)
        assert content(tmp_path / name) == before
    (tmp_path / "file").touch()
    with pytest.raises(ChainError, match="is a file"):
        export(model, tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("# Mine")
    export(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "README.md").read_text() == "# Mine"


def test_no_shard_of_an_earlier_export_is_read(tmp_path: Path) -> None:
    """One file and then shards, which transformers reads only where there is no `model.safetensors`; and back."""
    for number, size in enumerate(("5GB", "20KB", "10KB", "5GB")):
        model = make_chain(seed=number)
        folder = export_merged(model, tmp_path, max_shard_size=size)
        names = {path.name for path in folder.glob("*.safetensors*")}
        index = folder / "model.safetensors.index.json"
        used = {*json.loads(index.read_text())["weight_map"].values(), index.name} if index.exists() else names
        assert names == used and (names == {"model.safetensors"}) == (size == "5GB")
        found = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(found), logits(model), atol=1e-4, rtol=1e-4)


@EXPORTS
def test_the_base_model_is_not_overwritten(tmp_path: Path, export: Any) -> None:
    """Also if it is itself an export, which another export may replace."""
    export_merged(make_chain(seed=5), tmp_path / "base")
    before = content(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = add(base, "first", r=2, task_type="CAUSAL_LM")
    (tmp_path / "link").symlink_to("base")
    for name in ("base", "link"):
        with pytest.raises(ChainError, match="holds the base model"):
            export(model, tmp_path / name)
    assert content(tmp_path / "base") == before


@EXPORTS
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_killed_export_is_none_or_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any, call: int
) -> None:
    old, new = make_chain(tasks={"a": {"target_modules": ["q_proj"]}}), make_chain(seed=2)
    folder = export(old, tmp_path / "served")
    child = os.fork()
    if child == 0:
        try:
            at_call(monkeypatch, "os.replace", call, lambda: os.kill(os.getpid(), signal.SIGKILL))
            export(new, folder)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    read = load_stock if export is export_lora else AutoModelForCausalLM.from_pretrained
    with pytest.raises((ValueError, OSError)):  # no config
        read(folder)
    export(new, folder)
    torch.testing.assert_close(logits(read(folder)), logits(new), rtol=1e-4, atol=1e-4)
    assert not list(folder.glob(".*"))


@EXPORTS
def test_an_error_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any) -> None:
    folder = export(make_chain(seed=1), tmp_path / "served")
    before = content(folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        export(make_chain(seed=2), folder)
    assert content(folder) == before
    model = make_chain(seed=2)
    export(model, folder)
    assert set(content(folder)) == set(before)
    loaded = load_stock(folder) if export is export_lora else AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
