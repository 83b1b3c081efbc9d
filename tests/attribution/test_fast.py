"""The fast engine against the reference, on every architecture, on unusual batches and on models that deceive it."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_aso.attribution import FastPathUnsupported, find_neurons
from peft_aso.attribution.fast import group_examples
from tests.attribution.reference import largest_gap, run
from tests.tiny_models import ALL, SEQ2SEQ, tiny, tiny_batch

Batch = dict[str, torch.Tensor]


def assert_fast_is_reference(model: Any, batch: Batch, **settings: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = run(model, batch, "fast", **settings)
    reference = run(model, batch, "reference", **settings)
    assert largest_gap(fast.values, reference.values) <= 1e-4
    assert torch.allclose(fast.log_probability, reference.log_probability, atol=1e-4)
    assert fast.layout == reference.layout and fast.nodes == pytest.approx(reference.nodes)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", [*ALL, "llama_classifier", "llama eager"])
def test_fast_is_the_reference(name: str, padding: str, fresh_seed: int) -> None:
    name, *attention = name.split()
    model = tiny(name, seed=fresh_seed, attn_implementation=attention[0] if attention else None)
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


IDS = torch.arange(3, 21).reshape(2, 9)
COLUMNS = torch.arange(9).expand(2, 9)
ENDS = COLUMNS.ge(torch.tensor([[8], [7]]))  # an answer of one token, and one of two
PADDED = COLUMNS.lt(torch.tensor([[9], [6]]))
UNUSUAL: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {  # which tokens are the answer, and what else is different
    "interrupted answer": (ENDS | (COLUMNS == 2), {}),
    "no prompt": (PADDED & (COLUMNS > 0), {"attention_mask": PADDED.long()}),
    "no prompt in one row": (ENDS, {"attention_mask": COLUMNS.ge(torch.tensor([[7], [0]])).long()}),
    "own positions": (ENDS, {"position_ids": COLUMNS + 3}),
    "embedded": (ENDS, {"input_ids": None, "inputs_embeds": torch.sin(torch.arange(288.0)).reshape(2, 9, 16)}),
}


NO_POSITION_IDS = ("bloom", "own positions")  # BLOOM takes none


@pytest.mark.parametrize(
    ("name", "change"), sorted({*product(("llama", "gpt2", "bloom"), UNUSUAL)} - {NO_POSITION_IDS})
)
def test_unusual_causal_batches(name: str, change: str) -> None:
    answer, more = UNUSUAL[change]
    labels, mask = IDS.masked_fill(~answer, -100), torch.ones_like(IDS)
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": labels, **more}
    assert_fast_is_reference(tiny(name), {key: value for key, value in batch.items() if value is not None})


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
    before = run(model, batch, "fast")
    layer = find_neurons(model)[-2]
    layer.block.register_forward_pre_hook(lambda _, args: (args[0] * 1.1, *args[1:]))
    layer.block.register_forward_hook(
        lambda _, __, output: (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9
    )
    layer.module.register_forward_pre_hook(lambda _, args: args[0] * 1.2)
    assert_fast_is_reference(model, batch)
    assert largest_gap(run(model, batch, "fast").values, before.values) > 1e-3


def test_answers_of_about_the_same_length_share_a_pass(fresh_seed: int) -> None:
    assert [group.tolist() for group in group_examples(torch.tensor([1, 2, 4, 1]))] == [[0, 3], [1], [2]]
    assert [group.tolist() for group in group_examples(torch.tensor([99, 100, 60]))] == [[2], [0, 1]]
    lengths = torch.randint(1, 200, (100,))
    groups = group_examples(lengths)
    assert torch.cat(groups).sort().values.tolist() == list(range(100))
    assert all(lengths[group].min() >= 0.9 * lengths[group].max() - 1e-9 for group in groups)


class LookAhead(LlamaAttention):
    """Attention to later tokens: the prompt then depends on the answer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)


class Forgetful(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("this attention has no cache")
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (LookAhead, "differ by .* of the largest"),
        (Forgetful, "RuntimeError: this attention has no cache"),
        (LlamaAttention, "holes"),  # in the mask
    ],
)
def test_what_the_fast_engine_cannot_do_falls_back(attention: type[nn.Module], reason: str) -> None:
    model, holes = tiny("llama"), reason == "holes"
    for block in model.model.layers:
        block.self_attn.__class__ = attention
    batch = tiny_batch(model, 1, prompt=(6, 6))
    batch["attention_mask"][0, 2] = int(not holes)
    which, check = ("of this batch runs the slow", "") if holes else ("runs the", "self-check on LlamaForCausalLM: .*")
    with pytest.warns(UserWarning, match=f"{which} reference.*{reason}"):
        vector = run(model, batch, "auto")
    assert torch.equal(vector.values, run(model, batch, "reference").values)
    with pytest.raises(FastPathUnsupported, match=check + reason):
        run(model, batch, "fast")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # once for each model; holes are of that batch, not of the model
        run(model, tiny_batch(model, 2), "fast" if holes else "auto")


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that attribution could leave behind, in a form that compares with ==."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "forward": {name: vars(module).get("forward") for name, module in modules.items()},
        "hooks": {name: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for name, m in modules.items()},
        "grads": {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
        "weights": {name: (p.requires_grad, p.tolist()) for name, p in parameters.items()},
        "config": (model.config.to_dict(), model.config._attn_implementation),
        "random": torch.get_rng_state().tolist(),
    }


def unusual(name: str) -> nn.Module:
    """A model with mixed training flags, gradients, a frozen weight and a forward set on an instance."""
    model = tiny(name).train()
    layers = find_neurons(model)
    layers[0].block.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    original = layers[1].block.forward
    layers[1].block.forward = lambda *args, **kwargs: original(*args, **kwargs)
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_leaves_no_trace_and_works_where_gradients_are_off(name: str, method: str) -> None:
    model = unusual(name)
    batch = tiny_batch(model, 2)
    before, given = state_of(model), {key: value.clone() for key, value in batch.items()}
    first = run(model, batch, method)
    assert state_of(model) == before
    torch.testing.assert_close(batch, given, rtol=0, atol=0)
    assert not first.values.requires_grad
    torch.randn(5)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            vector = run(model, tiny_batch(model, 2), method)
            assert torch.is_grad_enabled() == (mode is nullcontext)
        assert torch.equal(vector.values, first.values)
        vector.values.requires_grad_().sum().backward()


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
@pytest.mark.parametrize("call", [1, 3, 12, 16])
def test_leaves_no_trace_after_an_exception(name: str, call: int) -> None:
    model = unusual(name)
    calls: list[None] = []

    def trip(*_: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    find_neurons(model)[-1].module.register_forward_pre_hook(trip)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, tiny_batch(model, 2), "auto", steps=6, max_rows=2)
    assert state_of(model) == before


def test_training_after_it_under_one_autocast_still_learns() -> None:
    """Autocast remembers cast weights: what was cast without gradients must be forgotten."""
    model = tiny("llama").train()
    batch = tiny_batch(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, batch, "fast", steps=2)
        model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.layers.parameters())
