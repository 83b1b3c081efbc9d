"""Chains on tiny models with random weights, for the tests of this folder."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_aso import ASOLoraConfig, load_chain
from tests.tiny_models import tiny, tiny_batch

TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def settings(architecture: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of a config for that tiny model."""
    return {
        "r": 2,
        "lora_alpha": 6,
        "task_type": TASK_TYPES[architecture],
        "fan_in_fan_out": architecture == "gpt2",
        **overrides,
    }


def randomize(model: Any, name: str) -> None:
    """Random A, B, LoRA biases and heads: new adapters have B = 0."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in f"{key}." and ("lora_" in key or "modules_to_save" in key):
                parameter.copy_(torch.randn_like(parameter) * 0.2)


def add(model: Any, name: str, **values: Any) -> Any:
    """One more task on top, with random weights, active, in eval mode; `values` of its config."""
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


def load(source: Any, **options: Any) -> Any:
    return load_chain(tiny("llama"), source, **options)


def logits(model: Any) -> torch.Tensor:
    """The model's logits on a fixed batch."""
    with torch.no_grad():
        return model(**tiny_batch(model, seed=3)).logits


def same_logits(model: Any, other: Any) -> None:
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-4)


def entries(folder: Path) -> dict[str, Any]:
    """Task -> its entry in the folder's chain.json."""
    return {entry["task"]: entry for entry in json.loads((folder / "chain.json").read_text())["tasks"]}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, change: Any) -> None:
    """Change an adapter: its config by a dict, its weights by a function."""
    if isinstance(change, dict):
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path = folder / SAFETENSORS_WEIGHTS_NAME
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})


def change_weights(folder: Path) -> None:
    """Other values in the first LoRA matrix of the file."""
    edit(folder, lambda weights: weights[min(key for key in weights if "lora_" in key)].view(-1)[:1].add_(1))


def at_call(monkeypatch: Any, function: str, number: int, then: Callable[[], object]) -> None:
    """Do `then` just before that call of a function, which is named with its module."""
    original, calls = pkgutil.resolve_name(function), itertools.count(1)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            then()
        return original(*args, **kwargs)

    monkeypatch.setattr(function, wrapper)


def described(model: Any) -> dict[str, Any]:
    """All that can be told of a model, with adapters or without, through public names."""
    found = {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, p.dtype, p.shape, p.requires_grad) for name, p in model.named_parameters()],
        "configs": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
    }
    tuner: Any = getattr(model, "base_model", None)
    if hasattr(tuner, "lora_layers"):
        found |= {
            "scales": {name: (each.scaling, each.r, each.lora_alpha) for name, each in tuner.lora_layers().items()},
            "tasks": (tuner.tasks.histories, tuner.tasks.missing, tuner.tasks.frozen),
            "active": (model.active_adapters, tuner.active_adapters),
            "targets": sorted(tuner.targeted_module_names),
            "vectors": {name: vector.tolist() for name, vector in tuner.attribution.items()},
        }
    return found


def check_same(model: Any, expected: Any) -> None:
    found, wanted = described(model), described(expected)
    for part in wanted:
        assert found[part] == wanted[part], part
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """After the block the model is as it was before."""
    before = copy.deepcopy(model)
    yield
    check_same(model, before)
