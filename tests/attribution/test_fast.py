"""The fast engine against the reference, on every architecture, on unusual batches and on models that deceive it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_aso.attribution import (
    AttributionConfig,
    AttributionVector,
    FastPathUnsupported,
    attribute,
    find_neurons,
    integrated_gradients,
)
from peft_aso.attribution.fast import group_examples
from tests.attribution.reference import largest_gap
from tests.tiny_models import ALL, SEQ2SEQ, tiny, tiny_batch

Batch = dict[str, torch.Tensor]


def run(model: Any, batch: Batch, method: str = "fast", **settings: Any) -> AttributionVector:
    return attribute(
        model, batch, AttributionConfig(**{"steps": 3, "quadrature": "riemann", **settings}), method=method
    )


def assert_fast_is_reference(model: Any, batch: Batch, **settings: Any) -> None:
    config = AttributionConfig(**{"steps": 3, "quadrature": "riemann", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = attribute(model, batch, config, method="fast")
    reference = integrated_gradients(model, batch, config)
    assert largest_gap(fast.values, reference.values) <= 1e-4
    assert torch.allclose(fast.log_probability, reference.log_probability, atol=1e-4)
    assert fast.layout == reference.layout and fast.nodes == pytest.approx(reference.nodes)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", [*ALL, "llama_classifier"])
def test_fast_is_the_reference(name: str, padding: str, fresh_seed: int) -> None:
    model = tiny(name, seed=fresh_seed)
    batch = tiny_batch(model, 4, seed=fresh_seed, padding=padding, prompt=(1, 9))
    assert_fast_is_reference(model, batch)


@pytest.mark.parametrize("max_rows", [None, 1, 4, 7])
@pytest.mark.parametrize("quadrature", ["adaptive", "gauss_legendre"])
@pytest.mark.parametrize("name", ["llama", "bloom", "t5", "bert"])
def test_rules_and_rows_at_once(name: str, quadrature: str, max_rows: int | None, fresh_seed: int) -> None:
    model = tiny(name, seed=fresh_seed)
    batch = tiny_batch(model, 5, seed=fresh_seed)
    if name != "bloom":  # whose float64 masks are NaN in transformers
        model = model.double()  # in float32 a node more or less is a matter of rounding
    assert_fast_is_reference(model, batch, quadrature=quadrature, steps=10, max_rows=max_rows)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_with_eager_attention(name: str) -> None:
    model = tiny(name, attn_implementation="eager")
    assert_fast_is_reference(model, tiny_batch(model, 3, padding="left"))
    assert model.config._attn_implementation == "eager"


def interrupted_answer(batch: Batch) -> Batch:
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 2] = batch["input_ids"][:, 2]
    return batch


def no_prompt(batch: Batch) -> Batch:
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, 0] = -100
    return batch


def own_positions(batch: Batch) -> Batch:
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + 3}


def embedded(batch: Batch) -> Batch:
    ids = batch.pop("input_ids")
    return {**batch, "inputs_embeds": torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(0))}


def no_prompt_in_one_row(batch: Batch) -> Batch:
    """What an example without a prompt shows is not enough for the self-check."""
    ids = torch.randint(3, 64, (2, 9))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    mask[0, :7] = 0
    labels[0, 8:], labels[1, 7:] = ids[0, 8:], ids[1, 7:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("change", [interrupted_answer, no_prompt, own_positions, embedded, no_prompt_in_one_row])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_unusual_causal_batches(name: str, change: Callable[[Batch], Batch]) -> None:
    if name == "bloom" and change is own_positions:
        pytest.skip("BLOOM takes no position_ids")
    model = tiny(name)
    assert_fast_is_reference(model, change(tiny_batch(model, 2)))


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_with_a_prompt_of_its_own(name: str) -> None:
    model = tiny(name)
    batch = tiny_batch(model, 2)
    ids = torch.randint(3, 64, (2, 6))
    batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.full_like(ids, -100)
    batch["labels"][0, 3:5], batch["labels"][1, 4:6] = 7, 9
    assert_fast_is_reference(model, batch)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_users_hooks_apply_once(name: str) -> None:
    """Put in after the self-check, so that it cannot notice."""
    model = tiny(name)
    batch = tiny_batch(model, 3)
    before = run(model, batch)
    layer = find_neurons(model)[-2]
    layer.block.register_forward_pre_hook(lambda _, args: (args[0] * 1.1, *args[1:]))
    layer.block.register_forward_hook(
        lambda _, __, output: (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9
    )
    layer.module.register_forward_pre_hook(lambda _, args: (args[0] * 1.2,))
    assert_fast_is_reference(model, batch)
    assert largest_gap(run(model, batch).values, before.values) > 1e-3


def test_answers_of_like_length_go_together() -> None:
    assert [group.tolist() for group in group_examples(torch.tensor([1, 2, 4, 1]))] == [[2], [1], [0, 3]]
    assert [group.tolist() for group in group_examples(torch.tensor([20, 19, 5, 20]))] == [[0, 1, 3], [2]]


class LookAhead(LlamaAttention):
    """Attention that sees what is to come: the prompt is then not independent of the answer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)


class Forgetful(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("this attention has no cache")
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [(LookAhead, "differ by .* of the largest"), (Forgetful, "RuntimeError: this attention has no cache")],
)
def test_a_model_that_is_not_what_it_seems_falls_back(attention: type[nn.Module], reason: str) -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.__class__ = attention
    batch = tiny_batch(model, 2)
    with pytest.warns(UserWarning, match=f"runs the reference.*{reason}"):
        vector = run(model, batch, "auto")
    assert torch.equal(vector.values, run(model, batch, "reference").values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # once for each model
        run(model, batch, "auto")
    with pytest.raises(FastPathUnsupported, match=f"self-check on LlamaForCausalLM: .*{reason}"):
        run(model, batch, "fast")


def test_a_mask_with_holes_is_for_the_reference() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 1, prompt=(6, 6))
    batch["attention_mask"][0, 2] = 0
    with pytest.warns(UserWarning, match="of this batch runs the slow reference: .*holes"):
        vector = run(model, batch, "auto")
    assert torch.equal(vector.values, run(model, batch, "reference").values)
    with pytest.raises(FastPathUnsupported, match="holes"):
        run(model, batch, "fast")
    run(model, tiny_batch(model, 2), "fast")  # of that batch, not of the model


# ---- the model is left as it was found ------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "forward": {name: vars(module).get("forward") for name, module in modules.items()},
        "hooks": {name: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for name, m in modules.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "config": (model.config.to_dict(), model.config._attn_implementation),
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after["grads"], before["grads"], rtol=0, atol=0)
    torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0)
    assert torch.equal(after["random"], before["random"])
    for key in ("training", "forward", "hooks", "requires_grad", "config"):
        assert after[key] == before[key], key


def unusual(name: str) -> nn.Module:
    """A model in a state of its own: mixed training flags, a gradient, a frozen weight, a forward put in place."""
    model = tiny(name)
    model.train()
    blocks = find_neurons(model)
    blocks[0].block.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    original = blocks[1].block.forward
    blocks[1].block.forward = lambda *args, **kwargs: original(*args, **kwargs)
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_leaves_no_trace(name: str, method: str) -> None:
    model = unusual(name)
    batch = tiny_batch(model, 2)
    given = {key: value.clone() for key, value in batch.items()}
    before = state_of(model)
    first = run(model, batch, method)
    assert_same(before, state_of(model))
    torch.testing.assert_close(batch, given, rtol=0, atol=0)
    torch.randn(5)
    assert torch.equal(run(model, batch, method).values, first.values)
    assert not first.values.requires_grad


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
@pytest.mark.parametrize("call", [1, 3, 12, 16])
def test_leaves_no_trace_after_an_exception(name: str, call: int) -> None:
    model = unusual(name)
    calls = 0

    def trip(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    hook = find_neurons(model)[-1].module.register_forward_pre_hook(trip)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, tiny_batch(model, 2), "auto", steps=6, max_rows=2)
    assert_same(before, state_of(model))
    hook.remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_works_where_gradients_are_off(name: str, method: str, mode: Callable[[], Any]) -> None:
    model = tiny(name)
    expected = run(model, tiny_batch(model, 2), method)
    with mode():
        vector = run(model, tiny_batch(model, 2), method)
        assert not torch.is_grad_enabled()
    assert torch.equal(vector.values, expected.values)
    vector.values.requires_grad_().sum().backward()


def test_training_after_it_under_one_autocast_still_learns() -> None:
    """Autocast remembers cast weights: what was cast without gradients must be forgotten."""
    model = tiny("llama").train()
    batch = tiny_batch(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, batch, steps=2)
        model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.layers.parameters())
