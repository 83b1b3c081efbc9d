"""Chains on tiny models with random weights, for the tests of this folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import peft_aso  # noqa: F401  (registers ASO_LORA)
from peft_aso import ASOLoraConfig
from peft_aso.tuner.layer import adapters_in, matrices_of
from tests.tiny_models import tiny, tiny_batch

TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "bert": ["query", "value"],
}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def settings(architecture: str, **overrides: Any) -> dict[str, Any]:
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
    """Random A, B, LoRA biases and heads: fresh adapters have B = 0."""
    with torch.no_grad():
        for layer in model.base_model.lora_layers().values():
            if adapters_in(layer, [name]):
                for matrix in matrices_of(layer, name):
                    matrix.copy_(torch.randn_like(matrix) * 0.2)
                if layer.lora_bias.get(name, False):
                    layer.lora_B[name].bias.normal_(0.0, 0.2)
        for key, parameter in model.named_parameters():
            if f"modules_to_save.{name}." in key:
                parameter.normal_(0.0, 0.3)


def make_chain(
    architecture: str = "llama", tasks: dict[str, dict[str, Any]] | None = None, seed: int = 0, **base: Any
) -> Any:
    """A `PeftModel` with random adapters, in eval mode; the last task is active."""
    torch.manual_seed(seed)
    overrides = {"first": {}, "second": {}, "third": {}} if tasks is None else tasks
    model: Any = tiny(architecture, **base)
    for name, values in overrides.items():
        config = ASOLoraConfig(**settings(architecture, **values))
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        randomize(model, name)
    model.set_adapter(list(overrides)[-1])
    return model.eval()


def stock_adapter(folder: Path, architecture: str = "llama", seed: int = 7, **overrides: Any) -> Any:
    """Save a stock LoRA adapter with random weights into `folder`; returns the model that it is in."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny(architecture), LoraConfig(**settings(architecture, **overrides)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder))
    return model.eval()


def logits(model: Any, seed: int = 3) -> torch.Tensor:
    """The model's logits on a fixed batch."""
    with torch.no_grad():
        return model(**tiny_batch(model, seed=seed)).logits


def killed_in_a_child(work: Callable[[], object]) -> None:
    """Run `work`, which has to end in SIGKILL, in a copy of this process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)  # reached only if nothing was killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
