"""The history's part of a layer's output: one stacked pair, never stale, without dropout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_aso.tuner import forms
from peft_aso.tuner.forms import stack
from peft_aso.tuner.layer import adapters_in, fingerprint, matrices_of, subspace_of
from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import TASKS, assert_is_sum, chain, fill, logits, summed

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def _first_layer(model: Any) -> Any:
    return next(iter(model.base_model.lora_layers().values()))


def test_stacked_it_is_the_sum():
    _, model = chain("gpt2", lora_bias=True)
    layer = _first_layer(model)
    pair = stack(layer, HISTORY)
    assert pair.down.shape == (4, 16) and pair.up.shape == (48, 4) and not pair.up.requires_grad
    x = torch.randn(5, 16)
    expected = sum(layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x)) for name in HISTORY)
    torch.testing.assert_close(x @ pair.down.T @ pair.up.T + pair.bias, expected)


def test_parts_of_a_layer():
    _, model = chain("llama", target_modules=["q_proj", "embed_tokens"])
    layers = model.base_model.lora_layers()
    linear, embedding = layers["model.layers.0.self_attn.q_proj"], layers["model.embed_tokens"]
    assert adapters_in(linear, ["imdb", *TASKS]) == list(TASKS) == adapters_in(embedding, TASKS)
    assert [m.shape for m in matrices_of(linear, CURRENT)] == [(2, 16), (16, 2)]
    assert [m.shape for m in matrices_of(embedding, CURRENT)] == [(2, 64), (16, 2)]
    assert subspace_of(embedding, CURRENT).shape == (2, 64)


def test_the_stack_is_made_once(monkeypatch: pytest.MonkeyPatch):
    _, model = chain("llama")
    made: list[Any] = []
    original = forms.stack
    monkeypatch.setattr(forms, "stack", lambda *args: made.append(args) or original(*args))
    count = len(model.base_model.lora_layers())
    for _ in range(3):
        logits(model)
        model.train()(**tiny_batch(model)).loss.backward()
        model.eval()
    assert len(made) == count


def test_dropout_acts_on_the_current_adapter_only():
    """With the current adapter at zero, a training pass is the history's, exactly: no mask was drawn for it."""
    base, model = chain("llama", lora_dropout=0.5)
    with torch.no_grad():
        for layer in model.base_model.lora_layers().values():
            layer.lora_B[CURRENT].weight.zero_()
    model.train()
    first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, logits(summed(base, model, HISTORY)), rtol=1e-4, atol=1e-4)
    fill(model, [CURRENT])
    assert not torch.equal(logits(model), logits(model))


def _set_scales(model: Any, path: Path) -> None:
    for layer in model.base_model.lora_layers().values():
        layer.set_scale("dbpedia", 3.0)
        layer.scaling["amazon"] = 0.5


def _reload(low: bool) -> Callable[[Any, Path], None]:
    def change(model: Any, path: Path) -> None:
        other = chain("llama")[1]
        fill(other, HISTORY, seed=7)
        other.save_pretrained(path)
        model.load_adapter(path / "dbpedia", adapter_name="dbpedia", low_cpu_mem_usage=low)

    return change


def _state_dict(assign: bool) -> Callable[[Any, Path], None]:
    def change(model: Any, path: Path) -> None:
        other = chain("llama")[1]
        fill(other, HISTORY, seed=8)
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)

    return change


def _there_and_back(model: Any, path: Path) -> None:
    for layer in model.base_model.lora_layers().values():  # loses half of the digits
        for module in (layer.lora_A["dbpedia"], layer.lora_B["dbpedia"]):
            module.to(torch.float8_e5m2).to(torch.float32)


def _in_place(model: Any, path: Path) -> None:
    fill(model, HISTORY, seed=9)


def _new_data(model: Any, path: Path) -> None:
    for layer in model.base_model.lora_layers().values():
        for _ in range(4):
            layer.lora_B["amazon"].weight.data = layer.lora_B["amazon"].weight.data * 1.5


def _new_parameter(model: Any, path: Path) -> None:
    for layer in model.base_model.lora_layers().values():
        weight = layer.lora_A["amazon"].weight
        layer.lora_A["amazon"].weight = torch.nn.Parameter(weight.detach() * 2, requires_grad=False)


CHANGES: dict[str, Callable[[Any, Path], None]] = {
    "scales": _set_scales,
    "load_adapter": _reload(False),
    "load_adapter(low_cpu_mem_usage=True)": _reload(True),
    "load_state_dict": _state_dict(False),
    "load_state_dict(assign=True)": _state_dict(True),
    "another dtype and back": _there_and_back,
    "in place": _in_place,
    "new data": _new_data,
    "new parameter": _new_parameter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change: str, tmp_path: Path):
    base, model = chain("llama")
    before = logits(model)
    before_penalty = model.base_model.orthogonality_penalty()
    CHANGES[change](model, tmp_path)
    assert_is_sum(model.eval(), base, TASKS)
    assert not torch.allclose(logits(model), before, rtol=1e-3, atol=1e-3)
    fresh = chain("llama")[1]
    fresh.load_state_dict(model.state_dict())
    penalty = model.base_model.orthogonality_penalty()
    torch.testing.assert_close(penalty, fresh.base_model.orthogonality_penalty())
    if change not in ("scales", "new data"):  # these leave A alone
        assert not torch.equal(penalty, before_penalty)


def test_a_bias_alone_is_noticed():
    base, model = chain("gpt2", lora_bias=True)
    logits(model)
    with torch.no_grad():
        for layer in model.base_model.lora_layers().values():
            layer.lora_B["dbpedia"].bias.add_(0.5)
    assert_is_sum(model, base, TASKS)


def test_a_deleted_task_s_stack_is_gone():
    base, model = chain("llama")
    logits(model)
    model.set_adapter("amazon")
    model.delete_adapter(CURRENT)
    assert_is_sum(model, base, HISTORY)


def test_the_fingerprint_sees_the_scale_and_the_values():
    _, model = chain("llama")
    layer = _first_layer(model)
    before = fingerprint(layer, HISTORY)
    assert fingerprint(layer, HISTORY) == before != fingerprint(layer, HISTORY[:1])
    layer.scaling["dbpedia"] *= 2
    assert fingerprint(layer, HISTORY) != before


def test_a_model_that_was_run_in_inference_mode_can_be_trained():
    """What is kept from there may not be an inference tensor: autograd could not save it."""
    _, model = chain("llama")
    with torch.inference_mode():
        model(**tiny_batch(model))
        model.base_model.orthogonality_penalty()
        model.base_model.set_soft_coefficients(dict.fromkeys(HISTORY, torch.tensor(0.5)))
    model.train()
    (model(**tiny_batch(model)).loss + model.base_model.orthogonality_penalty()).backward()
    model.base_model.set_soft_coefficients(dict.fromkeys(HISTORY, 0.25))
    assert all(p.grad is not None for n, p in model.named_parameters() if f".{CURRENT}." in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype):
    """Adapters are float32 under a half-precision base, as PEFT makes them; the output has the base's dtype."""
    base, model = chain("llama", base=tiny("llama").to(dtype))
    found = logits(model)
    assert found.dtype == dtype
    expected = logits(summed(base.float(), model.float(), TASKS))
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_under_autocast_the_history_takes_part():
    base, model = chain("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    expected = logits(summed(base, model, TASKS))
    without = logits(summed(base, model, [CURRENT]))
    assert (found.float() - expected).abs().max() < 0.2 * (found.float() - without).abs().max()


def test_gradients_are_those_of_the_sum():
    """The gradient of the current adapter through a model with a history, against the same with a merged history."""
    base, model = chain("llama")
    _, alone = chain("llama", [CURRENT], base=summed(base, model, HISTORY))
    with torch.no_grad():
        values = dict(model.named_parameters())
        for name, parameter in alone.named_parameters():
            if f".{CURRENT}." in name:
                parameter.copy_(values[name])
    for each in (model, alone):
        each.train()(**tiny_batch(each)).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and found
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)
