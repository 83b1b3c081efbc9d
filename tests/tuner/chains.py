"""Chains of tasks on tiny models, and what such a chain computes, written out by hand without PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_aso import ASOLoraConfig
from tests.tiny_models import tiny, tiny_batch

TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "output.dense"],
}
TASKS = ("dbpedia", "amazon", "agnews")


def config_for(kind: str, **settings: Any) -> ASOLoraConfig:
    """A config for the tiny model `kind`; `settings` replace the defaults."""
    defaults = {"r": 2, "lora_alpha": 8, "task_type": TASK_TYPES[kind], "target_modules": list(TARGETS[kind])}
    return ASOLoraConfig(**{**defaults, **settings})


def fill(model: Any, names: Iterable[str], seed: int = 0) -> None:
    """Give the named adapters (and their heads) random weights, as if they were trained. B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in names:
            for name, parameter in model.named_parameters():
                if f".{adapter}." in f"{name}.":
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def chain(kind: str = "llama", tasks: Sequence[str] = TASKS, base: Any = None, **settings: Any) -> tuple[Any, Any]:
    """A bare base model and a PEFT model of an equal one, with one filled adapter a task; the last is active."""
    base = tiny(kind) if base is None else base
    first, *rest = tasks
    model = get_peft_model(copy.deepcopy(base), config_for(kind, **settings), adapter_name=first)
    for task in rest:
        model.add_adapter(task, config_for(kind, **settings))
    model.set_adapter(tasks[-1])
    fill(model, tasks)
    return base, model.eval()


def summed(base: nn.Module, model: Any, names: Iterable[str], head: str | None = None) -> nn.Module:
    """Eq. 3 without PEFT: a copy of `base` with the deltas of the named adapters added to its weights.

    Args:
        head: the adapter whose copied heads (modules_to_save) the result has; None: the base model's.
    """
    result = copy.deepcopy(base)
    with torch.no_grad():
        for module_name, layer in model.base_model.lora_layers().items():
            plain: Any = result.get_submodule(module_name)
            for name in names:
                if name in layer.lora_embedding_A:
                    delta = (layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]).T
                elif name in layer.lora_A:
                    delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
                    if isinstance(plain, Conv1D):
                        delta = delta.T
                    if layer.lora_B[name].bias is not None:
                        plain.bias += layer.lora_B[name].bias * layer.scaling[name]
                else:
                    continue
                plain.weight += delta * layer.scaling[name]
    if head is not None:
        for module_name, module in model.base_model.model.named_modules():
            if module_name.endswith(f"modules_to_save.{head}"):
                owner = module_name.removesuffix(f".modules_to_save.{head}")
                result.get_submodule(owner).load_state_dict(module.state_dict())
    return result


def logits(model: Any, batch: dict[str, torch.Tensor] | None = None, **more: Any) -> torch.Tensor:
    """The model's logits on a fixed batch, without gradients."""
    with torch.no_grad():
        return model(**(batch if batch is not None else tiny_batch(model, batch_size=3)), **more).logits


def assert_is_sum(model: Any, base: Any, names: Sequence[str], head: str | None = None) -> None:
    """The model's logits are those of the sum by hand, and not those of a sum without one of the adapters."""
    found, expected = logits(model), logits(summed(base, model, names, head))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for left_out in names:
        others = [name for name in names if name != left_out]
        assert not torch.allclose(found, logits(summed(base, model, others, head)), rtol=1e-3, atol=1e-3)


def parameters_of(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, its copied heads among them."""
    found = {name: value for name, value in model.named_parameters() if f".{adapter}." in f"{name}."}
    assert found, f"no parameters of {adapter}"
    return found


def copy_of(model: Any, adapters: Iterable[str]) -> dict[str, torch.Tensor]:
    """The values of the adapters' parameters now."""
    return {
        name: value.detach().clone() for adapter in adapters for name, value in parameters_of(model, adapter).items()
    }


def assert_frozen(model: Any, adapters: Iterable[str], values: dict[str, torch.Tensor] | None = None) -> None:
    """No parameter of the adapters trains; with `values`, they are what they were, bit for bit."""
    for adapter in adapters:
        for name, parameter in parameters_of(model, adapter).items():
            assert not parameter.requires_grad, f"{name} trains"
            assert values is None or torch.equal(values[name], parameter), f"{name} has changed"


def state_of(model: Any) -> tuple[Any, ...]:
    """What a refused call may not change: adapters, what is active, parameters, what trains, logits."""
    parameters = {name: (value.requires_grad, value.detach().clone()) for name, value in model.named_parameters()}
    return list(model.peft_config), model.active_adapters, parameters, logits(model)


def assert_same(model: Any, before: tuple[Any, ...]) -> None:
    """The model is as it was when `state_of` was called."""
    after = state_of(model)
    assert after[:2] == before[:2]
    assert list(after[2]) == list(before[2])
    for name, (trains, value) in after[2].items():
        assert trains == before[2][name][0] and torch.equal(value, before[2][name][1]), name
    assert torch.equal(after[3], before[3])
    assert not model.base_model.tasks.missing
