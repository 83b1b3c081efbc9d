"""Chains on tiny models with random weights, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso import ASOLoraConfig
from tests.tiny_models import tiny, tiny_batch

TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "bert": ["query", "value"],
}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def settings(architecture: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of a config for that tiny model."""
    values: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": TARGETS[architecture],
        "task_type": TASK_TYPES[architecture],
        "fan_in_fan_out": architecture == "gpt2",
    }
    return {**values, **overrides}


def randomize(model: Any, name: str) -> None:
    """Random A, B, LoRA biases and heads: new adapters have B = 0."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in f"{key}." and ("lora_" in key or "modules_to_save" in key):
                parameter.copy_(torch.randn_like(parameter) * 0.2)


def add(model: Any, name: str, **values: Any) -> Any:
    """One more task on top, with random weights, active, in eval mode; `values` of its config, with target_modules."""
    config = ASOLoraConfig(**values)
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    model.set_adapter(name)
    randomize(model, name)
    return model.eval()


def make_chain(
    architecture: str = "llama", tasks: dict[str, dict[str, Any]] | None = None, seed: int = 0, **base: Any
) -> Any:
    """A `PeftModel` with random adapters, in eval mode; the last task is active."""
    torch.manual_seed(seed)
    model: Any = tiny(architecture, **base)
    for name, values in ({"first": {}, "second": {}, "third": {}} if tasks is None else tasks).items():
        model = add(model, name, **settings(architecture, **values))
    return model


def stock_adapter(folder: Path, architecture: str = "llama", seed: int = 7, **overrides: Any) -> Any:
    """Save a stock LoRA adapter with random weights into `folder`; returns the model that it is in."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny(architecture), LoraConfig(**settings(architecture, **overrides)))
    randomize(model, "default")
    model.save_pretrained(str(folder))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """The model's logits on a fixed batch."""
    with torch.no_grad():
        return model(**tiny_batch(model, seed=3)).logits


def same_logits(model: Any, other: Any) -> None:
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-4)


def entries(folder: Path) -> dict[str, Any]:
    """Task -> its entry in the folder's chain.json."""
    return {entry["task"]: entry for entry in json.loads((folder / "chain.json").read_text())["tasks"]}


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_weights(folder: Path) -> None:
    """Other values in the first LoRA matrix of the file."""
    edit_weights(folder, lambda weights: weights[min(key for key in weights if "lora_" in key)].view(-1)[:1].add_(1))


def state(model: Any) -> dict[str, Any]:
    """All that can be told of a model through public names."""
    tuner = model.base_model
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, p.dtype, p.shape, p.requires_grad) for name, p in model.named_parameters()],
        "scales": {name: (layer.scaling, layer.r, layer.lora_alpha) for name, layer in tuner.lora_layers().items()},
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
        "tasks": (tuner.tasks.histories, tuner.tasks.missing, tuner.tasks.frozen),
        "active": (model.active_adapters, tuner.active_adapters),
        "targets": sorted(tuner.targeted_module_names),
        "vectors": {name: vector.tolist() for name, vector in tuner.attribution.items()},
    }


def check_same(model: Any, expected: Any) -> None:
    """Two models are equal in everything, and so are their tensors."""
    found, wanted = state(model), state(expected)
    for part in wanted:
        assert found[part] == wanted[part], part
    values, wanted_values = model.state_dict(), expected.state_dict()
    assert list(values) == list(wanted_values)
    assert all(torch.equal(values[name], wanted_values[name]) for name in values)
