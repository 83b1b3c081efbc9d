"""Base weight, history and active adapter as one matrix: for looking, not for training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import TASKS, assert_is_sum, chain, fill, logits

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def _wholes(model: Any) -> list[Any]:
    return [layer.whole_cache._held for layer in model.base_model.lora_layers().values()]


@pytest.mark.parametrize("form", ["auto", "stacked", "dense"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_it_is_the_sum(kind: str, form: str, fresh_seed: int):
    base, model = chain(kind, history_form=form, lora_bias=kind == "gpt2")
    fill(model, TASKS, seed=fresh_seed)
    heads: dict[str, Any] = {task: task if kind == "bert" else None for task in TASKS}
    tuner, flags = model.base_model, [p.requires_grad for p in model.parameters()]
    with tuner.as_one():
        assert_is_sum(model, base, TASKS, head=heads[CURRENT])
        assert all(held is not None for held in _wholes(model))
        for number, task in enumerate(TASKS):
            with tuner.through(task):
                assert_is_sum(model, base, TASKS[: number + 1], head=heads[task])
            with tuner.only(task):
                assert_is_sum(model, base, [task], head=heads[task])
    with tuner.only("amazon"), tuner.as_one():
        assert_is_sum(model, base, ["amazon"], head=heads["amazon"])
    assert _wholes(model) == [None] * len(_wholes(model))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_is_sum(model, base, TASKS, head=heads[CURRENT])


def test_no_adapter_is_multiplied(monkeypatch: pytest.MonkeyPatch):
    _, model = chain("llama")
    shapes: list[torch.Size] = []
    original = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: shapes.append(w.shape) or original(x, w, b)
    )
    layer = next(iter(model.base_model.lora_layers().values()))
    x = torch.randn(2, layer.in_features)
    with model.base_model.as_one():
        layer(x)
        assert shapes == [layer.base_layer.weight.shape]
    shapes.clear()
    layer(x)
    assert len(shapes) == 3  # base with history, A, B


def test_changes_inside_are_noticed():
    base, model = chain("llama")
    with model.base_model.as_one():
        logits(model)
        fill(model, [CURRENT], seed=3)
        assert_is_sum(model, base, TASKS)
        fill(model, HISTORY, seed=4)
        assert_is_sum(model, base, TASKS)
        for layer in model.base_model.lora_layers().values():
            layer.scaling[CURRENT] *= 2
        assert_is_sum(model, base, TASKS)


def test_training_goes_on_as_ever_inside():
    _, model = chain("llama")
    model.train()
    model(**tiny_batch(model)).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with model.base_model.as_one():
        model(**tiny_batch(model)).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, grad)
        model.zero_grad()
        with pytest.raises(RuntimeError, match="does not require grad"):
            model.eval()(**tiny_batch(model)).loss.backward()  # documented: no gradient reaches the adapter


def test_activations_have_their_gradient():
    _, model = chain("llama")
    layer = next(iter(model.base_model.lora_layers().values()))
    grads = []
    for context in (model.base_model.through(CURRENT), model.base_model.as_one()):
        x = torch.linspace(-1, 1, layer.in_features).repeat(2, 1).requires_grad_()
        with context:
            layer(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_nested_and_after_an_exception():
    base, model = chain("llama")
    tuner = model.base_model
    with pytest.raises(RuntimeError, match="stop"), tuner.as_one():
        with tuner.as_one():
            logits(model)
        assert tuner.tasks.as_one and _wholes(model)[0] is not None
        raise RuntimeError("stop")
    assert not tuner.tasks.as_one and _wholes(model)[0] is None
    assert_is_sum(model, base, TASKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_as_usual(dtype: torch.dtype):
    _, model = chain("llama", base=tiny("llama").to(dtype))
    before = logits(model)
    with model.base_model.as_one():
        assert torch.equal(logits(model), before)
        assert set(_wholes(model)) == {None}
    _, model = chain("llama")
    with torch.autocast("cpu", dtype=dtype):
        before = logits(model)
        with model.base_model.as_one():
            assert torch.equal(logits(model), before)


def test_other_layers_run_as_usual():
    base, model = chain("llama", target_modules=["q_proj", "embed_tokens"])
    with model.base_model.as_one():
        assert_is_sum(model, base, TASKS)
    _, dora = chain("llama", TASKS[:1], use_dora=True)
    before = logits(dora)
    with dora.base_model.as_one():
        assert torch.equal(logits(dora), before)


def test_switched_off_merged_and_mixed_inside():
    base, model = chain("llama")
    batch = tiny_batch(model, batch_size=3)
    names = ["dbpedia", "__base__", CURRENT]
    mixed = logits(model, batch, adapter_names=names)
    with model.base_model.as_one():
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))
        torch.testing.assert_close(logits(model, batch, adapter_names=names), mixed)
        before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert_is_sum(model, base, TASKS)
