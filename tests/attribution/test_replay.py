"""Recording a pass, replacing neurons, skipping blocks: and all of it gone afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from peft_aso.attribution import find_neurons
from peft_aso.attribution.replay import recorded, scaled, skipped, take
from tests.tiny_models import tiny, tiny_batch


def test_take_repeats_examples_through_structures() -> None:
    rows = torch.tensor([1, 0, 1])
    x, shared = torch.arange(6).view(2, 3), torch.zeros(1, 5)
    nested = (x, [shared, None], {"x": x}, BaseModelOutput(last_hidden_state=x), 3)
    first, (second, nothing), third, fourth, number = take(nested, rows, 2)
    assert torch.equal(first, x[rows]) and torch.equal(third["x"], x[rows])
    assert isinstance(fourth, BaseModelOutput) and torch.equal(fourth.last_hidden_state, x[rows])
    assert second is shared and nothing is None and number == 3
    assert take(shared, torch.zeros(4).long(), 1).shape == (4, 5)


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bart"])
def test_scaling_by_one_and_skipping_change_nothing(name: str) -> None:
    model = tiny(name)
    batch = tiny_batch(model, 2)
    layer = find_neurons(model)[-1]
    width = batch["labels"].shape[1]
    everywhere = {layer.stack: torch.ones(2, width, dtype=torch.bool)}
    with torch.no_grad(), recorded([layer], everywhere, outputs=True) as recording:
        logits = model(**batch).logits
    neurons = recording.neurons[layer.name]
    assert neurons.shape == (2, width, layer.size)
    rows = torch.arange(2)
    lower: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *_: lower.append(1))
        for module in layer.blocks[0].modules()
        if module is not layer.blocks[0]
    ]
    with (
        skipped(layer, recording, 2, rows),
        scaled(layer, neurons, torch.ones(2), everywhere[layer.stack]) as leaf,
    ):
        replayed = model(**batch).logits
    for each in hooks:
        each.remove()
    assert not lower, "a skipped block ran"
    assert torch.allclose(replayed, logits, atol=1e-6)
    (gradient,) = torch.autograd.grad(replayed.sum(), leaf)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, logits, atol=1e-6)
    assert all("forward" not in vars(block) for block in layer.blocks)
    assert not layer.module._forward_pre_hooks


def test_an_input_that_is_not_one_vector_per_position_is_refused() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 2)
    layer = find_neurons(model)[0]
    wrong = {"single": torch.ones(2, 3, dtype=torch.bool)}
    with (
        pytest.raises(ValueError, match="not one vector of 24 for each of 2 x 3 positions"),
        recorded([layer], wrong, outputs=False),
    ):
        model(**batch)
    assert not layer.module._forward_pre_hooks
