"""The export is one stock LoRA adapter that stock PEFT loads with the same logits, in a process of its
own.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from peft_aso import HistoryError, MissingHistoryError, load_chain
from peft_aso.chain import ChainError, export, export_lora, save_chain
from peft_aso.tuner.layer import adapters_in, matrices_of
from tests.chain.chains import logits, make_chain, settings
from tests.tiny_models import tiny, tiny_batch

# what differs from task to task, and which extra tests each architecture carries
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "llama": (
        "llama",
        {
            "first": {"r": 2, "lora_alpha": 7, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
            "second": {"r": 3, "use_rslora": True, "target_modules": ["v_proj", "down_proj", "lm_head"]},
            "third": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        },
    ),
    "llama_bias": ("llama", {"first": {"lora_bias": True}, "second": {}}),
    "gpt2": (
        "gpt2",
        {
            "first": {"target_modules": ["c_attn"], "r": 3},
            "second": {"target_modules": ["mlp.c_proj", "c_attn"], "use_rslora": True},
        },
    ),
    "t5": (
        "t5",
        {
            "first": {},
            "second": {"target_modules": r"decoder\..*EncDecAttention\.(q|k)", "r": 3},
            "third": {"target_modules": ["wo"], "lora_alpha": 1},
        },
    ),
    "bert": (
        "bert",
        {
            "first": {},
            "second": {"r": 3, "target_modules": ["query", "output.dense"]},
            "third": {"use_rslora": True},
        },
    ),
    "embedding": ("llama", {"first": {"target_modules": ["embed_tokens", "q_proj"], "r": 3}, "second": {}}),
    "embeddings": (
        "gpt2",
        {
            "first": {"target_modules": ["wte", "c_attn"], "r": 3},
            "second": {"target_modules": ["wte"], "use_rslora": True, "fan_in_fan_out": False},
        },
    ),
}
OVERRIDES: dict[str, dict[str, Any]] = {"llama_bias": {"attention_bias": True}}


def describe_base(folder: Path, architecture: str, case: str) -> Any:
    """Write a base model and a batch so that a process without our test code can read them."""
    base = tiny(architecture, **OVERRIDES.get(case, {}))
    folder.mkdir(parents=True)
    values = {key: value for key, value in base.config.to_dict().items() if key != "transformers_version"}
    (folder / "description.json").write_text(json.dumps({"class": type(base).__name__, "config": values}))
    torch.save(base.state_dict(), folder / "weights.pt")
    torch.save(tiny_batch(base, seed=3), folder / "batch.pt")
    return base


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Case -> our model and what the stock process found."""
    root = tmp_path_factory.mktemp("exports")
    jobs, models = [], {}
    for case, (architecture, tasks) in CASES.items():
        describe_base(root / case / "base", architecture, case)
        model = make_chain(architecture, tasks, **OVERRIDES.get(case, {}))
        export_lora(model, root / case / "served")
        jobs.append([str(root / case / "base"), str(root / case / "served")])
        models[case] = model
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("stock_process.py")
    command = [sys.executable, str(script), str(root / "jobs.json"), str(root / "results.pt")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    found = torch.load(root / "results.pt", weights_only=True)
    return {case: (models[case], result) for case, result in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_gives_the_same_logits(results: Any, case: str) -> None:
    model, found = results[case]
    ours = logits(model)
    with model.disable_adapter():
        assert (logits(model) - ours).abs().max() > 1e-2  # the adapters matter
    # the folded history rounds the sum of weight and adapters: 1e-5 of the largest logit, not of each
    torch.testing.assert_close(found["logits"], ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_finds_a_plain_adapter(results: Any, case: str) -> None:
    model, found = results[case]
    names = model.base_model.tasks.expand(model.active_adapters)
    layers = {name: layer for name, layer in model.base_model.lora_layers().items() if adapters_in(layer, names)}
    most = max(
        sum(matrices_of(layer, name)[0].shape[0] for name in adapters_in(layer, names)) for layer in layers.values()
    )
    assert found["warnings"] == []
    assert found["modules"] == sorted(layers)
    assert (found["scales"], found["ranks"], found["peft_type"]) == ([1.0], [most], "LORA")


def test_merged_model_is_the_export(results: Any) -> None:
    _, found = results["llama"]
    merged = make_chain(*CASES["llama"]).merge_and_unload()
    # merging rounds the sum of weight and adapters, so that the two agree less closely than the adapters do
    torch.testing.assert_close(logits(merged), found["logits"], rtol=1e-4, atol=1e-4)


def test_config_is_stock(tmp_path: Path) -> None:
    model = make_chain(*CASES["llama"])
    model.peft_config["third"].base_model_name_or_path = "somebody/model"
    folder = export_lora(model, tmp_path / "served")
    assert folder == tmp_path / "served"
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    values = json.loads((folder / CONFIG_NAME).read_text())
    stock = LoraConfig().to_dict()
    assert values.keys() == stock.keys()
    assert (values["r"], values["lora_alpha"]) == (9, 9)
    assert (values["rank_pattern"], values["alpha_pattern"], values["use_rslora"]) == ({}, {}, False)
    assert (values["task_type"], values["base_model_name_or_path"]) == ("CAUSAL_LM", "somebody/model")
    assert (values["layers_to_transform"], values["lora_dropout"], values["bias"]) == (None, 0.0, "none")
    text = (folder / CONFIG_NAME).read_text() + (folder / "README.md").read_text()
    assert "aso" not in text.lower().replace("reason", "")
    shapes = {
        tuple(tensor.shape)[:1]
        for name, tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items()
        if "lora_A" in name
    }
    assert shapes == {(9,)}
    assert "- rank 9, alpha 9" in text
    assert "first, second, third" in text
    assert "--max-lora-rank 16" in text


def test_automatic_mapping_without_a_task_type(tmp_path: Path) -> None:
    model = make_chain(tasks={"first": {"task_type": None}})
    export_lora(model, tmp_path)
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert values["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def load_stock(architecture: str, folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny(architecture), str(folder)).eval()


def test_chosen_tasks_come_without_their_history(tmp_path: Path) -> None:
    model = make_chain(*CASES["llama"])
    export_lora(model, tmp_path / "one", tasks=["second"])
    with model.base_model.only("second"):
        torch.testing.assert_close(logits(load_stock("llama", tmp_path / "one")), logits(model))
    export_lora(model, tmp_path / "two", tasks=["third", "second"])
    two = load_stock("llama", tmp_path / "two")
    weight = "model.layers.0.self_attn.q_proj.weight"
    ours = make_chain(*CASES["llama"]).base_model.lora_layers()["model.layers.0.self_attn.q_proj"]
    delta = two.merge_and_unload().state_dict()[weight] - tiny("llama").state_dict()[weight]
    torch.testing.assert_close(delta, ours.get_delta_weight("third"))


def test_task_names_and_adapter_names(tmp_path: Path) -> None:
    model = make_chain(tasks={"default": {"task_name": "reviews"}, "second": {}})
    export_lora(model, tmp_path / "by-task", tasks=["reviews"])
    export_lora(model, tmp_path / "by-adapter", tasks=["default"])
    first, second = (load_file(tmp_path / name / SAFETENSORS_WEIGHTS_NAME) for name in ("by-task", "by-adapter"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_scale_that_was_changed_counts(tmp_path: Path) -> None:
    model = make_chain(tasks={"first": {}})
    for layer in model.base_model.lora_layers().values():
        layer.scale_layer(0.5)
    export_lora(model, tmp_path)
    torch.testing.assert_close(logits(load_stock("llama", tmp_path)), logits(model))


@pytest.mark.parametrize("max_rank", [1, 3, 6])
def test_max_rank_is_the_best_of_that_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture, max_rank: int) -> None:
    model = make_chain(*CASES["llama"])
    names = ["first", "second", "third"]
    with caplog.at_level(logging.WARNING, logger="peft_aso"):
        export_lora(model, tmp_path, max_rank=max_rank)
    weights = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    bounds, norms = {}, {}
    for name, layer in model.base_model.lora_layers().items():
        delta = torch.stack(
            [layer.get_delta_weight(task).detach().double() for task in adapters_in(layer, names)]
        ).sum(0)
        down, up = (weights[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert down.shape[0] == up.shape[1] == max_rank
        bounds[name] = float(torch.linalg.svdvals(delta.detach())[max_rank:].square().sum().sqrt())
        norms[name] = float(torch.linalg.matrix_norm(delta))
        error = float(torch.linalg.matrix_norm(up @ down - delta))
        assert error == pytest.approx(bounds[name], abs=2e-6 * norms[name])
    total = math.hypot(*bounds.values()) / math.hypot(*norms.values())
    worst = max(bounds[name] / norms[name] for name in bounds)
    stated = f"{total:.2e} over all weights, {worst:.2e} at worst"
    assert f"rank {max_rank} instead of 9: relative error {stated}" in caplog.text
    assert stated in (tmp_path / "README.md").read_text()


def test_large_max_rank_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_chain(*CASES["llama"])
    export_lora(model, tmp_path / "all")
    export_lora(model, tmp_path / "enough", max_rank=9)
    first, second = (load_file(tmp_path / name / SAFETENSORS_WEIGHTS_NAME) for name in ("all", "enough"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not caplog.records


def test_rank_above_vllms(tmp_path: Path) -> None:
    model = make_chain(tasks={"first": {"r": 300}, "second": {"r": 300, "target_modules": ["q_proj"]}})
    with pytest.warns(UserWarning, match="rank 600; vLLM loads ranks up to 512.*max_rank=512"):
        export_lora(model, tmp_path)
    assert "above its largest" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_half_precision(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = make_chain().to(torch.bfloat16)
    export_lora(model, tmp_path, dtype=dtype)
    weights = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {dtype or torch.bfloat16}
    stock = PeftModel.from_pretrained(tiny("llama").to(torch.bfloat16), str(tmp_path), autocast_adapter_dtype=False)
    name = "model.layers.1.self_attn.v_proj"
    layer = model.base_model.lora_layers()[name]
    delta = torch.stack(
        [
            layer.scaling[task] * b.double() @ a.double()
            for task in model.peft_config
            for a, b in [matrices_of(layer, task)]
        ]
    ).sum(0)
    down, up = (weights[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    # alpha / r = 3, folded into B: bfloat16 rounds it, and the README says by how much
    error = float(torch.linalg.matrix_norm(up @ down - delta.detach()) / torch.linalg.matrix_norm(delta.detach()))
    assert error < (1e-7 if dtype == torch.float32 else 2**-8)
    stated = re.search(r"norm: (\S+) over all weights", (tmp_path / "README.md").read_text())
    assert stated is not None
    assert (float(stated[1]) > 1e-4) == (error > 1e-4)
    assert logits(stock).dtype == torch.bfloat16


def test_head_of_the_last_task(tmp_path: Path) -> None:
    model = make_chain("bert")
    with pytest.warns(UserWarning, match=r"modules_to_save of \['first', 'second'\] are left out.*'third'"):
        export_lora(model, tmp_path)
    head = model.base_model.model.classifier.modules_to_save["third"]
    weights = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    assert torch.equal(weights["base_model.model.classifier.weight"], head.weight)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["modules_to_save"] == ["classifier", "score"]


def test_convolutions(tmp_path: Path) -> None:
    """A convolution's matrices have kernels; the SVD takes them flattened."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    from peft_aso import ASOLoraConfig
    from tests.chain.chains import randomize

    torch.manual_seed(0)
    base = Net()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model: Any = get_peft_model(base, ASOLoraConfig(r=2, lora_alpha=6, target_modules=["conv"]), "first")
    model.add_adapter("second", ASOLoraConfig(r=3, target_modules=["conv"]))
    model.set_adapter("second")
    for name in ("first", "second"):
        randomize(model, name)
    export_lora(model, tmp_path / "exact")
    export_lora(model, tmp_path / "short", max_rank=4)
    x = torch.randn(2, 3, 6, 6)
    fresh = Net()
    fresh.load_state_dict(state)
    stock = PeftModel.from_pretrained(fresh, str(tmp_path / "exact")).eval()
    torch.testing.assert_close(stock(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "short" / SAFETENSORS_WEIGHTS_NAME)["base_model.model.conv.lora_A.weight"].shape == (
        4,
        3,
        3,
        3,
    )


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["fourth"]}, r"tasks=\['fourth'\]: give each task once.*'first', 'second', 'third'"),
        ({"tasks": []}, "give each task once"),
        ({"tasks": ["first", "first"]}, "give each task once"),
        ({"max_rank": 0}, "max_rank=0 must be a whole number"),
        ({"max_rank": 2.5}, "max_rank=2.5 must be a whole number"),
        ({"dtype": torch.int8}, "torch.int8 is not a floating point type"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ChainError, match=message):
        export_lora(make_chain(), tmp_path / "served", **options)
    assert not (tmp_path / "served").exists()


def test_only_our_models(tmp_path: Path) -> None:
    for model in (tiny("llama"), get_peft_model(tiny("llama"), LoraConfig(**settings("llama")))):
        with pytest.raises(ChainError, match="needs a PeftModel with ASO_LORA"):
            export_lora(model, tmp_path)


def test_dora_alone_is_no_lora(tmp_path: Path) -> None:
    model = make_chain(tasks={"first": {"use_dora": True}})
    with pytest.raises(ChainError, match="'first' cannot be part of a stock LoRA adapter: .*DoRA"):
        export_lora(model, tmp_path)


def test_missing_history(tmp_path: Path) -> None:
    make_chain().save_pretrained(str(tmp_path / "chain"))
    with pytest.warns(UserWarning, match="does not hold yet"):
        model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "chain" / "second"))
    with pytest.raises((MissingHistoryError, HistoryError), match="'first'"):
        export_lora(model, tmp_path / "served")
    export_lora(model, tmp_path / "alone", tasks=["second"])


def test_not_into_a_chain(tmp_path: Path) -> None:
    model = make_chain()
    save_chain(model, tmp_path / "ours")
    make_chain(tasks={"default": {}}).save_pretrained(str(tmp_path / "pefts"))
    for name in ("ours", "pefts"):
        with pytest.raises(ChainError, match="holds a chain of tasks or another adapter"):
            export_lora(model, tmp_path / name)
    load_chain(tiny("llama"), tmp_path / "ours")


def test_nan_is_not_written(tmp_path: Path) -> None:
    model = make_chain()
    layer = model.base_model.lora_layers()["model.layers.1.self_attn.q_proj"]
    with torch.no_grad():
        layer.lora_A["first"].weight[0, 0] = float("nan")
    with pytest.raises(ChainError, match="model.layers.1.self_attn.q_proj hold NaN or Inf"):
        export_lora(model, tmp_path / "served")
    with torch.no_grad():
        layer.lora_A["first"].weight[0, 0] = 1e6
    with pytest.raises(ChainError, match="too large for that type.*torch.float32"):
        export_lora(model, tmp_path / "served", dtype=torch.float16)
    assert not (tmp_path / "served").exists()


def test_lora_bias_beside_an_embedding(tmp_path: Path) -> None:
    tasks: dict[str, dict[str, Any]] = {
        "first": {"lora_bias": True},
        "second": {"target_modules": ["embed_tokens"]},
    }
    model = make_chain(tasks=tasks, attention_bias=True)
    with pytest.raises(ChainError, match="lora_bias and model.embed_tokens is an embedding"):
        export_lora(model, tmp_path)


def test_module_within_a_saved_head(tmp_path: Path) -> None:
    """One task trains a LoRA on what another saves as a whole: no stock adapter can hold both."""
    model = make_chain(tasks={"first": {"target_modules": ["gate_proj"]}, "second": {"modules_to_save": ["mlp"]}})
    with pytest.raises(ChainError, match="modules_to_save=.*'mlp'"):
        export_lora(model, tmp_path)


def test_failure_keeps_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_lora(make_chain(seed=1), tmp_path / "served")
    before = {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_lora(make_chain(seed=2), tmp_path / "served")
    assert {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()} == before
    assert os.listdir(tmp_path) == ["served"]
    monkeypatch.undo()
    model = make_chain(seed=2)
    export_lora(model, tmp_path / "served")
    torch.testing.assert_close(logits(load_stock("llama", tmp_path / "served")), logits(model), rtol=1e-5, atol=1e-5)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ChainError, match="is a file"):
        export_lora(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_not_into_a_model_and_not_over_a_readme_of_somebody(tmp_path: Path) -> None:
    model = make_chain()
    tiny("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ChainError, match="holds a model"):
        export_lora(model, tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("# Mine")
    export_lora(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "README.md").read_text() == "# Mine"
    readme = export_lora(model, tmp_path / "out") / "README.md"
    assert "rank 6" in readme.read_text()
    export_lora(model, tmp_path / "out", max_rank=2)
    assert "rank 2" in readme.read_text()
