"""The forms of a history: the same sum on fresh random inputs, chosen by dtype and rank, one held at a time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch

from peft_aso.tuner import HistoryError
from peft_aso.tuner.forms import (
    DenseHistory,
    FoldedHistory,
    FormCache,
    StackedHistory,
    build,
    fold_obstacle,
    merge_pair,
    stack,
)
from peft_aso.tuner.forward import add_form
from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import TASKS, assert_is_sum, chain, config_for, fill, logits, summed

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]
FORMS = ("auto", "stacked", "dense", "folded")


def forms_held(model: Any) -> list[Any]:
    """What each layer holds of its history at the moment."""
    held = [layer.history_cache._held for layer in model.base_model.lora_layers().values()]
    return [None if each is None else each.form for each in held]


def _layer(model: Any, ending: str = "") -> Any:
    return next(layer for name, layer in model.base_model.lora_layers().items() if name.endswith(ending))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_every_form_is_the_sum(kind: str, form: str, fresh_seed: int):
    base, model = chain(kind, history_form=form, lora_bias=kind == "gpt2", use_rslora=kind == "t5")
    fill(model, TASKS, seed=fresh_seed)
    assert_is_sum(model, base, TASKS, head=CURRENT if kind == "bert" else None)
    kinds = {"auto": FoldedHistory, "folded": FoldedHistory, "dense": DenseHistory, "stacked": StackedHistory}
    assert {type(held) for held in forms_held(model)} == {kinds[form]}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_same_in_every_form(form: str, fresh_seed: int):
    """Against PEFT's own sum of all adapters, each active."""
    _, model = chain("llama", history_form=form)
    _, plain = chain("llama", history=[])
    for each in (model, plain):
        fill(each, TASKS, seed=fresh_seed)
    plain.base_model.set_adapter(list(TASKS))
    for each in (model, plain):
        each.train()(**tiny_batch(each)).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in plain.named_parameters() if f".{CURRENT}." in name}
    assert found.keys() == expected.keys() and found
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)


def test_a_layer_s_forms_agree_in_double_precision(fresh_seed: int):
    _, model = chain("gpt2", base=tiny("gpt2").double(), lora_bias=True)
    fill(model.double(), TASKS, seed=fresh_seed)
    layer, x = _layer(model, "c_attn"), torch.randn(5, 16, dtype=torch.float64)
    expected = sum(layer.scaling[n] * layer.lora_B[n](layer.lora_A[n](x)) for n in HISTORY)
    forms = {form: build(layer, HISTORY, form, None) for form in ("stacked", "dense", "folded")}
    for form in ("stacked", "dense"):
        torch.testing.assert_close(add_form(layer, x, forms[form]), expected)
    weight, bias = forms["folded"]
    torch.testing.assert_close(x @ (weight - layer.base_layer.weight) + bias, expected)


def test_auto_takes_the_smaller_one_where_folding_would_round(fresh_seed: int):
    _, model = chain("llama", base=tiny("llama").bfloat16(), target_modules=["q_proj", "v_proj", "down_proj"], r=3)
    logits(model)
    layers = model.base_model.lora_layers()
    for layer, held in zip(layers.values(), forms_held(model), strict=True):
        rank, size = 3 * len(HISTORY), layer.in_features * layer.out_features
        expected = DenseHistory if rank * (layer.in_features + layer.out_features) > size else StackedHistory
        assert type(held) is expected and {t.dtype for t in held if t is not None} == {torch.bfloat16}
    assert {type(held) for held in forms_held(model)} == {StackedHistory, DenseHistory}
    _, model = chain("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # W + delta would be rounded there, too
        logits(model)
    assert FoldedHistory not in {type(held) for held in forms_held(model)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, form: str, fresh_seed: int):
    base, model = chain("llama", base=tiny("llama").to(dtype), history_form=form)
    fill(model, TASKS, seed=fresh_seed)
    found = logits(model)
    assert found.dtype == dtype
    expected = logits(summed(base.float(), model.float(), TASKS))
    # a number is right to eps / 2 in each of some forty sums; without the history all of it would differ
    assert (found.float() - expected).norm() < 20 * torch.finfo(dtype).eps * expected.norm()


def test_folding_into_half_precision_sums_in_float32_and_rounds_once(fresh_seed: int):
    _, model = chain("llama", base=tiny("llama").bfloat16(), history_form="folded")
    fill(model, TASKS, seed=fresh_seed)
    layer = _layer(model, "q_proj")
    delta = sum(layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in HISTORY)
    expected = (layer.base_layer.weight.float() + delta).bfloat16()
    found = build(layer, HISTORY, "folded", None).weight
    assert found.dtype == torch.bfloat16 and (found != expected).float().mean() < 0.02  # the order of the sum
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    logits(model)
    assert {type(held) for held in forms_held(model)} == {FoldedHistory}


@pytest.mark.parametrize("form", ["dense", "folded"])
def test_what_is_kept_is_made_in_full_precision_under_autocast(form: str):
    base, model = chain("llama", history_form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        held = build(_layer(model), HISTORY, form, torch.float32)[0]
        logits(model)
    assert torch.equal(held, build(_layer(model), HISTORY, form, None)[0])
    assert_is_sum(model, base, TASKS)  # what was kept there serves here only if it is exact


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_take_every_form(form: str, fresh_seed: int):
    base, model = chain("llama", target_modules=["q_proj", "embed_tokens"], history_form=form)
    fill(model, TASKS, seed=fresh_seed)
    assert_is_sum(model, base, TASKS)
    kinds = {"dense": DenseHistory}
    assert type(_layer(model, "embed_tokens").history_cache._held.form) is kinds.get(form, StackedHistory)


def test_a_large_rank_is_dense_and_the_same(fresh_seed: int):
    base, model = chain("llama", r=12, base=tiny("llama").bfloat16().float())
    fill(model, TASKS, seed=fresh_seed)
    layer, x = _layer(model, "q_proj"), torch.randn(3, 16)
    held = build(layer, HISTORY, "auto", None)
    assert isinstance(held, DenseHistory)
    torch.testing.assert_close(add_form(layer, x, held), add_form(layer, x, stack(layer, HISTORY)))


def test_different_scales_ranks_and_dtypes_are_stacked(fresh_seed: int):
    _, model = chain("llama", TASKS[:1])
    model.add_adapter("amazon", config_for("llama", r=5, lora_alpha=3))
    model.add_adapter("agnews", config_for("llama", r=1))
    fill(model, TASKS, seed=fresh_seed)
    layer, x = _layer(model), torch.randn(4, 16)
    layer.lora_A["amazon"].bfloat16()
    pair = stack(layer, TASKS)
    assert pair.down.shape == (8, 16) and pair.down.dtype == torch.float32
    expected = sum(layer.scaling[n] * x @ layer.lora_A[n].weight.float().T @ layer.lora_B[n].weight.T for n in TASKS)
    torch.testing.assert_close(x @ pair.down.T @ pair.up.T, expected)


def test_one_form_is_held_and_the_stale_one_is_freed():
    _, model = chain("llama", history_form="folded")
    logits(model)
    old = [weakref.ref(held.weight) for held in forms_held(model)]
    assert old and all(reference() is not None for reference in old)
    model.base_model.peft_config[CURRENT].history_form = "stacked"
    model.set_adapter(CURRENT)
    logits(model)
    gc.collect()
    assert {type(held) for held in forms_held(model)} == {StackedHistory}
    assert all(reference() is None for reference in old)
    model.set_adapter(TASKS[0])  # has no history
    assert forms_held(model) == [None] * len(old)


def test_the_setting_is_saved_and_checked(tmp_path: Any):
    _, model = chain("llama", history_form="dense")
    model.save_pretrained(tmp_path)
    assert type(config_for("llama")).from_pretrained(tmp_path / CURRENT).history_form == "dense"
    assert config_for("llama").history_form == "auto"
    with pytest.raises(ValueError, match="history_form='unfolded' is not known. Choose one of: auto, stacked"):
        config_for("llama", history_form="unfolded")


def test_each_task_has_its_own_form():
    _, model = chain("llama", TASKS[:2], history_form="stacked")
    model.add_adapter(CURRENT, config_for("llama", history_form="dense"))
    model.set_adapter(CURRENT)
    logits(model)
    assert {type(held) for held in forms_held(model)} == {DenseHistory}
    with model.base_model.through("amazon"):
        logits(model)
        assert {type(held) for held in forms_held(model)} == {StackedHistory}


class _Quantized(torch.nn.Linear):
    """A linear layer with 8-bit weights of PEFT's default dispatch, as quantization backends have."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        quantized = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(quantized, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def _quantized_llama(names: tuple[str, ...]) -> Any:
    base = tiny("llama")
    for name, module in list(base.named_modules()):
        if name.endswith(names):
            base.set_submodule(name, _Quantized(module))
    return base


@pytest.mark.parametrize("form", ["auto", "dense", "stacked"])
def test_a_quantized_base_is_left_alone(form: str, fresh_seed: int):
    base = _quantized_llama(("q_proj", "v_proj", "down_proj"))
    _, model = chain("llama", base=base, history_form=form)
    fill(model, TASKS, seed=fresh_seed)
    layer = _layer(model)
    x = torch.randn(2, 3, layer.in_features)
    expected = layer.base_layer(x) + sum(layer.scaling[n] * layer.lora_B[n](layer.lora_A[n](x)) for n in TASKS)
    torch.testing.assert_close(layer(x), expected)
    assert fold_obstacle(layer) == "its base layer is a _Quantized"
    assert not isinstance(layer.history_cache._held.form, FoldedHistory)


def test_folding_is_refused_with_a_reason_where_nothing_can_be_folded():
    base = _quantized_llama(("q_proj", "v_proj", "down_proj"))
    _, model = chain("llama", TASKS[:1], base=base)
    model.add_adapter("amazon", config_for("llama", history_form="folded"))
    with pytest.raises(
        HistoryError, match=r"history of 'amazon' cannot be folded.*is a _Quantized.*history_form = \"auto\""
    ):
        model.set_adapter("amazon")
    assert model.active_adapters == [TASKS[0]]
    model.peft_config["amazon"].history_form = "auto"
    model.set_adapter("amazon")
    _, mixed = chain("llama", base=_quantized_llama(("q_proj",)), history_form="folded")
    logits(mixed)
    assert {type(held) for held in forms_held(mixed)} == {FoldedHistory, StackedHistory}


def test_merging_a_pair_equals_the_sum_in_double(fresh_seed: int):
    _, model = chain("llama")
    pair = stack(_layer(model), TASKS)
    weight = torch.randn(16, 16)
    for transposed in (False, True):
        delta = pair.up.double() @ pair.down.double()
        expected = weight.double() - (delta.T if transposed else delta)
        torch.testing.assert_close(merge_pair(weight, pair, transposed, -1), expected.float(), rtol=0, atol=1e-6)


def test_copies_of_a_cache_are_empty():
    _, model = chain("llama")
    logits(model)
    cache = _layer(model).history_cache
    for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(again, FormCache) and again._held is None
    assert cache._held is not None
