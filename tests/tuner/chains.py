"""Chains of tasks on tiny models, and what such a chain computes, written out by hand without PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_aso import ASOLoraConfig
from tests.tiny_models import tiny, tiny_batch

KINDS: dict[str, tuple[str, list[str]]] = {
    "llama": ("CAUSAL_LM", ["q_proj", "v_proj", "down_proj"]), "gpt2": ("CAUSAL_LM", ["c_attn", "c_proj"]),
    "t5": ("SEQ_2_SEQ_LM", ["q", "v", "wo"]), "bert": ("SEQ_CLS", ["query", "value", "output.dense"]),
}  # fmt: skip
TASKS = ("dbpedia", "amazon", "agnews")
HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def config_for(kind: str = "llama", **settings: Any) -> ASOLoraConfig:
    """A config for the tiny model `kind`; `settings` replace the defaults."""
    task_type, targets = KINDS.get(kind, ("CAUSAL_LM", []))
    return ASOLoraConfig(**{"r": 2, "lora_alpha": 8, "task_type": task_type, "target_modules": [*targets], **settings})


def fill(model: Any, names: Iterable[str], seed: int = 0) -> None:
    """Give the named adapters (and their heads) random weights, as if they were trained. B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in names:
        for parameter in parameters_of(model, adapter).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def add(model: Any, task: str, config: ASOLoraConfig, seed: int = 0) -> Any:
    """Add a task to the chain, or start one on a bare model; activate it and fill it, as training would."""
    if isinstance(model, PeftModel):
        model.add_adapter(task, config)
    else:
        model = get_peft_model(model, config, adapter_name=task)
    model.set_adapter(task)
    fill(model, [task], seed)
    return model


def chain(
    kind: str = "llama", tasks: Sequence[str] = TASKS, base: Any = None, seed: int = 0, **settings: Any
) -> tuple[Any, Any]:
    """A bare base model and a PEFT model of an equal one, with one filled adapter a task; the last is active."""
    base = tiny(kind) if base is None else base
    model = copy.deepcopy(base)
    for number, task in enumerate(tasks):
        model = add(model, task, config_for(kind, **settings), seed + number)
    return base, model.eval()


def load(folder: Path, tasks: Sequence[str] = TASKS, base: Any = None, **settings: Any) -> Any:
    """Read the tasks in this order with PEFT's own functions; the last one of `TASKS` among them is active."""
    base = tiny("llama") if base is None else base
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was trained on top of")
        model = PeftModel.from_pretrained(base, folder / tasks[0], adapter_name=tasks[0], **settings)
        for task in tasks[1:]:
            model.load_adapter(folder / task, adapter_name=task, **settings)
    model.set_adapter(max(tasks, key=TASKS.index))
    return model.eval()


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    change(tensors := load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **values}))


def summed(base: nn.Module, model: Any, names: Iterable[str], head: str | None = None) -> Any:
    """Eq. 3 without PEFT: a copy of `base` plus the updates of the named adapters, with the heads of `head`."""
    result = copy.deepcopy(base).requires_grad_(False)
    for module_name, layer in model.base_model.lora_layers().items():
        module: Any = result.get_submodule(module_name)
        for name in names:
            if name in layer.lora_embedding_A:
                delta = (layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]).T
            elif name in layer.lora_A:
                delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
                delta = delta.T if isinstance(module, Conv1D) else delta
                if layer.lora_B[name].bias is not None:
                    module.bias += layer.lora_B[name].bias.detach() * layer.scaling[name]
            else:
                continue
            module.weight += delta.detach() * layer.scaling[name]
    for module_name, copied in model.base_model.model.named_modules():
        if head is not None and module_name.endswith(f".modules_to_save.{head}"):
            owner = module_name.removesuffix(f".modules_to_save.{head}")
            result.get_submodule(owner).load_state_dict(copied.state_dict())
    return result


def logits(model: Any, batch: dict[str, torch.Tensor] | None = None, **more: Any) -> torch.Tensor:
    """The model's logits on a fixed batch, without gradients."""
    with torch.no_grad():
        return model(**(batch if batch is not None else tiny_batch(model, batch_size=3)), **more).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_is_sum(model: Any, base: Any, names: Sequence[str], head: str | None = None) -> None:
    """The model's logits are those of the sum by hand, and not those of a sum without one of the adapters."""
    found = logits(model)
    assert_close(found, logits(summed(base, model, names, head)))
    for left_out in names:
        others = [name for name in names if name != left_out]
        assert not torch.allclose(found, logits(summed(base, model, others, head)), rtol=1e-3, atol=1e-3)


def assert_merged(merged: nn.Module, expected: nn.Module) -> None:
    """The merged model has the weights of the sum by hand, to rounding."""
    assert list(merged.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of the loss by parameter name, only those that there are."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def first_layer(model: Any, ending: str = "") -> Any:
    """The first LoRA layer whose module name ends like this."""
    return next(layer for name, layer in model.base_model.lora_layers().items() if name.endswith(ending))


def parameters_of(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, its copied heads among them."""
    found = {name: value for name, value in model.named_parameters() if f".{adapter}." in f"{name}."}
    assert found, f"no parameters of {adapter}"
    return found


def copy_of(model: Any, adapters: Iterable[str]) -> dict[str, torch.Tensor]:
    """The values of the adapters' parameters now."""
    return {name: each.detach().clone() for task in adapters for name, each in parameters_of(model, task).items()}


def assert_frozen(model: Any, adapters: Iterable[str], values: dict[str, torch.Tensor] | None = None) -> None:
    """No parameter of the adapters trains; with `values`, they are what they were, bit for bit."""
    for name, each in (item for adapter in adapters for item in parameters_of(model, adapter).items()):
        assert not each.requires_grad and (values is None or torch.equal(values[name], each)), name


def state_of(model: Any) -> tuple[Any, ...]:
    """What a refused call may not change: adapters, what is active, what is missing, what trains; logits, weights."""
    trains = {name: value.requires_grad for name, value in model.named_parameters()}
    same = (list(model.peft_config), model.active_adapters, dict(model.base_model.tasks.missing), trains)
    return same, [logits(model), *(value.detach().clone() for value in model.parameters())]


def assert_same(model: Any, before: tuple[Any, ...]) -> None:
    """The model is as it was when `state_of` was called."""
    same, tensors = state_of(model)
    assert same == before[0] and all(map(torch.equal, tensors, before[1]))
