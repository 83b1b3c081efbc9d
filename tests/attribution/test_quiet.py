"""The model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peft_aso.attribution import find_neurons, integrated_gradients
from tests.tiny_models import tiny, tiny_batch

Batch = dict[str, torch.Tensor]


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = {
        name: tuple(len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks"))
        for name, module in model.named_modules()
    }
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "forward": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "hooks": hooks,
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "random": torch.get_rng_state(),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


def disturbed(name: str) -> nn.Module:
    """A model in a state of its own: mixed training flags, a gradient, a frozen weight, a forward put in
    place."""
    model = tiny(name)
    model.train()
    blocks = find_neurons(model)
    blocks[0].block.eval()
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[1].requires_grad_(False)
    original = blocks[1].block.forward
    blocks[1].block.forward = lambda *args, **kwargs: original(*args, **kwargs)
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("method", ["fast", "plain"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_leaves_no_trace(name: str, method: str) -> None:
    model = disturbed(name)
    batch = tiny_batch(model, 2)
    kept = {key: value.clone() for key, value in batch.items()}
    before = state_of(model)
    first = integrated_gradients(model, batch, steps=3, method=method)
    assert_same(before, state_of(model))
    assert_same(kept, batch)
    torch.randn(5)
    assert torch.equal(integrated_gradients(model, batch, steps=3, method=method).values, first.values)
    assert not first.values.requires_grad


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
@pytest.mark.parametrize("call", [1, 3, 12, 16])
def test_leaves_no_trace_after_an_exception(name: str, call: int) -> None:
    model = disturbed(name)
    batch = tiny_batch(model, 2)
    calls = 0

    def trip(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    last = find_neurons(model)[-1].module
    hook = last.register_forward_pre_hook(trip)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        integrated_gradients(model, batch, steps=6, max_rows=2)
    assert_same(before, state_of(model))
    hook.remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["fast", "plain"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_works_where_gradients_are_off(name: str, method: str, mode: Callable[[], Any]) -> None:
    model = tiny(name)
    expected = integrated_gradients(model, tiny_batch(model, 2), steps=3, method=method)
    with mode():
        batch = tiny_batch(model, 2)
        vector = integrated_gradients(model, batch, steps=3, method=method)
        assert not torch.is_grad_enabled()
    assert torch.equal(vector.values, expected.values)
    vector.values.requires_grad_().sum().backward()


def test_training_after_it_under_one_autocast_still_learns() -> None:
    """Autocast remembers cast weights: what was cast without gradients must be forgotten."""
    model = tiny("llama").train()
    batch = tiny_batch(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        integrated_gradients(model, batch, steps=2)
        model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.layers.parameters())
