"""Prompts shared between rows against copies of them, and what cannot be shared."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache

from peft_aso.attribution import integrated_gradients
from peft_aso.attribution import self_check as checks
from peft_aso.attribution.prompt_cache import FixedLayer
from peft_aso.attribution.shared_attention import (
    Handover,
    Prompt,
    RowPlan,
    SharingUnsupported,
    _Attend,
    shared_prompt_attention,
    sharing,
)
from tests.attribution.reference import largest_gap
from tests.tiny_models import ALL, tiny, tiny_batch

SHARES = ["llama", "mistral", "qwen2", "gpt2", "opt", "gpt_neox", "phi", "t5", "t5_v11", "bart"]


@pytest.mark.parametrize(
    ("which", "each", "times"), [((0, 1), 3, 4), ((1, 3, 0), 2, 1), ((0,), 5, 1), ((2,), 1, 1), ((0, 1, 2, 3), 1, 2)]
)
def test_a_plan_is_read_off_its_rows(which: tuple[int, ...], each: int, times: int) -> None:
    plan = RowPlan(which, each, times)
    rows = torch.tensor(which).repeat_interleave(each).repeat(times)
    assert RowPlan.of(rows) == plan
    states = torch.randn(len(rows), 6, 2, 4)
    grouped = plan.grouped(states, heads=3)
    for example, place in enumerate(which):
        own = states[rows == place]  # (n, 6, 2, 4)
        assert torch.equal(grouped[example].permute(1, 0, 2, 3, 4).flatten(1, 2), own)
    assert torch.equal(plan.ungrouped(grouped), states.transpose(1, 2))
    assert torch.equal(plan.of_examples(torch.arange(5)), torch.tensor(which))


def test_rows_that_follow_no_plan_are_refused() -> None:
    with pytest.raises(SharingUnsupported, match="whole examples"):
        RowPlan.of(torch.tensor([0, 0, 1]))
    with pytest.raises(SharingUnsupported):
        RowPlan.of(torch.tensor([1, 0, 0, 1]))
    with pytest.raises(SharingUnsupported):
        RowPlan.of(torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_and_its_gradient(own: bool, dtype: torch.dtype, fresh_seed: int) -> None:
    """Against the softmax written out over the concatenated keys, values, masks and gradients."""
    torch.manual_seed(fresh_seed)
    examples, heads, n, group, width, size, length = 2, 3, 5, 2, 3, 4, 6
    q = torch.randn(examples, heads, n, group, width, size, dtype=dtype, requires_grad=True)
    pk, pv = torch.randn(2, examples, heads, length, size, dtype=dtype)
    k = torch.randn(examples, heads, n, width, size, dtype=dtype, requires_grad=True) if own else None
    v = torch.randn(examples, heads, n, width, size, dtype=dtype, requires_grad=True) if own else None
    bias = torch.randn(examples, 1, 1, 1, width, length + width)
    bias[0, ..., 0] = torch.finfo(torch.float32).min  # padding
    parts = (bias[..., :length], bias[..., length:]) if own else (bias[..., :length], None)
    leaves = [x for x in (q, k, v) if x is not None]
    out = _Attend.apply(q, pk, pv, k, v, *parts)

    def repeated(prompt: torch.Tensor, mine: torch.Tensor | None) -> torch.Tensor:
        many = prompt[:, :, None].expand(-1, -1, n, -1, -1)
        return many if mine is None else torch.cat([many, mine], 3)

    keys, values = repeated(pk, k), repeated(pv, v)
    scores = torch.einsum("ehngwd,ehnkd->ehngwk", q, keys) + torch.cat([p for p in parts if p is not None], -1)
    expected = torch.einsum("ehngwk,ehnkd->ehngwd", scores.softmax(-1), values)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert torch.allclose(out, expected, atol=tolerance)
    weight = torch.randn_like(out)
    for mine, reference in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(mine, reference, atol=10 * tolerance)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", SHARES)
def test_shared_is_copied(name: str, padding: str, fresh_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name, seed=fresh_seed).double()
    batch = tiny_batch(model, 4, seed=fresh_seed, padding=padding, prompt=(2, 9))
    shared = integrated_gradients(model, batch, steps=3, method="fast")
    assert not checks.copies_prompts(model)
    monkeypatch.setattr(checks, "_copying", {model})
    copied = integrated_gradients(model, batch, steps=3, method="fast")
    assert largest_gap(shared.values, copied.values) <= 1e-5


@pytest.mark.parametrize("name", [name for name in ALL if name in ("gptj", "bloom", "falcon", "gemma2")])
def test_attentions_that_cannot_share_get_copies(name: str) -> None:
    model = tiny(name)
    held = model.config._attn_implementation
    integrated_gradients(model, tiny_batch(model, 2), steps=2, method="fast")
    assert checks.copies_prompts(model)
    assert model.config._attn_implementation == held


def test_the_models_attention_is_put_back() -> None:
    model = tiny("llama")
    held = model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt), sharing(model, Handover()):
        assert model.model.layers[0].self_attn.config._attn_implementation != held
        raise KeyboardInterrupt
    assert model.config._attn_implementation == held


def offered(handover: Handover) -> Cache:
    keys = torch.randn(1, 2, 5, 4)
    layer = FixedLayer(keys, keys, torch.zeros(3, dtype=torch.long), handover, RowPlan((0,), 3, 1))
    return Cache(layers=[layer])


def test_a_prompt_that_nobody_takes_is_an_error() -> None:
    handover = Handover()
    cache = offered(handover)
    new = torch.randn(3, 2, 1, 4)
    with pytest.raises(SharingUnsupported, match="registry"), sharing(tiny("llama"), handover):
        cache.update(new, new, 0)
    with pytest.raises(SharingUnsupported, match="registry"):
        cache.update(new, new, 0)


@pytest.mark.parametrize("odd", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}])
def test_unknown_terms_of_an_attention_are_refused(odd: dict[str, object]) -> None:
    handover = Handover()
    handover.offer(Prompt(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), RowPlan((0,), 3, 1), whole=False))
    new = torch.randn(3, 2, 1, 4)
    with pytest.raises(SharingUnsupported, match="softcap"), sharing(tiny("llama"), handover):
        shared_prompt_attention(torch.nn.Module(), new, new, new, None, **odd)  # type: ignore[arg-type]
