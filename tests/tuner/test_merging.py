"""Merging many adapters in one product a layer: Eq. 3, rounded once, and PEFT's own way where that is no sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear

from peft_aso.tuner import active
from peft_aso.tuner.merging import Buffers
from tests.tiny_models import tiny
from tests.tuner.chains import TASKS, assert_is_sum, chain, config_for, fill, logits, summed

CURRENT = TASKS[-1]


def _layer(model: Any) -> Any:
    return next(iter(model.base_model.lora_layers().values()))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_one_product_is_pefts_sum(kind: str, safe: bool, fresh_seed: int):
    base, model = chain(kind, lora_bias=kind == "gpt2", use_rslora=kind == "t5")
    fill(model, TASKS, seed=fresh_seed)
    expected, before = summed(base, model, TASKS), logits(model)
    model.merge_adapter(safe_merge=safe)
    for name, layer in model.base_model.lora_layers().items():
        assert layer.merged_adapters == list(TASKS)
        plain = expected.get_submodule(name)
        torch.testing.assert_close(layer.base_layer.weight, plain.weight, rtol=0, atol=1e-6)
        if plain.bias is not None:
            torch.testing.assert_close(layer.base_layer.bias, plain.bias, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name, layer in model.base_model.lora_layers().items():
        assert not layer.merged
        torch.testing.assert_close(layer.base_layer.weight, base.get_submodule(name).weight, rtol=0, atol=1e-6)
    assert_is_sum(model, base, TASKS)


def test_peft_s_products_are_not_called(monkeypatch: pytest.MonkeyPatch):
    _, model = chain("llama")
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *args: pytest.fail("one product an adapter"))
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, fresh_seed: int):
    _, model = chain("llama", base=tiny("llama").to(dtype))
    fill(model, TASKS, seed=fresh_seed)
    layer = _layer(model)
    original = layer.base_layer.weight.detach().clone()
    delta = sum(layer.scaling[n] * layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double() for n in TASKS)
    expected = (original.double() + delta).to(dtype)
    model.merge_adapter()
    assert layer.base_layer.weight.dtype == dtype
    assert (layer.base_layer.weight != expected).float().mean() < 0.02  # float32 against float64, on a tie
    model.unmerge_adapter()
    tolerance = 2 * torch.finfo(dtype).eps * (original.abs() + delta.abs()).max().item()
    torch.testing.assert_close(layer.base_layer.weight, original, rtol=0, atol=tolerance)


def test_under_autocast_merging_is_in_full_precision():
    base, model = chain("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = model.merge_and_unload()
    for name, value in summed(base, chain("llama", base=base)[1], TASKS).state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("broken", [["dbpedia"], [CURRENT], ["amazon", CURRENT]])
def test_a_safe_merge_checks_before_it_writes(broken: list[str]):
    base, model = chain("llama")
    layer = _layer(model)
    with torch.no_grad():
        for name in broken:
            layer.lora_B[name].weight[1, 0] = float("inf")
    with pytest.raises(ValueError, match=f"NaNs detected.*adapter {broken[0]} seems to be broken"):
        model.merge_adapter(safe_merge=True)
    name = next(iter(model.base_model.lora_layers()))
    assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight) and not layer.merged_adapters


def test_a_sum_that_is_too_large_names_all_of_them():
    _, model = chain("llama", base=tiny("llama").half())
    layer = _layer(model)
    with torch.no_grad():
        for name in TASKS:
            layer.lora_A[name].weight.fill_(100.0)
            layer.lora_B[name].weight.fill_(60.0)
    with pytest.raises(ValueError, match="The sum of dbpedia, amazon, agnews is too large"):
        layer.merge(safe_merge=True, adapter_names=list(TASKS))


def test_more_may_be_merged_later_and_nothing_twice():
    base, model = chain("llama")
    layer = _layer(model)
    name = next(iter(model.base_model.lora_layers()))
    layer.merge(adapter_names=["dbpedia"])
    with pytest.warns(UserWarning, match="Already following adapters were merged dbpedia"):
        layer.merge(adapter_names=["dbpedia", "amazon"])
    expected = summed(base, model, ["dbpedia", "amazon"]).get_submodule(name).weight
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge(adapter_names=["amazon"])
    with pytest.raises(TypeError, match="list of strings"):
        layer.merge(adapter_names="amazon")
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, base.get_submodule(name).weight, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_dora_merges_as_peft_does():
    _, model = chain("llama", TASKS[:1], use_dora=True)
    before = logits(model)
    layer = _layer(model)
    original = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    assert layer.merged_adapters == [TASKS[0]] and not torch.equal(layer.base_layer.weight, original)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, original, rtol=0, atol=1e-5)


def test_a_bias_without_a_place_is_pefts_error():
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        _, model = chain("llama", lora_bias=True)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_adapter()


def test_a_folded_history_is_freed_by_merging_and_right_after_it():
    base, model = chain("llama", history_form="folded")
    logits(model)
    model.merge_adapter()
    assert _layer(model).history_cache._held is None
    torch.testing.assert_close(logits(model), logits(summed(base, model, TASKS)), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_is_sum(model, base, TASKS)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)


def test_adapters_in_some_layers_only():
    base, model = chain("llama", TASKS[:1])
    model.add_adapter("amazon", config_for("llama", r=5, target_modules=["k_proj"]))
    model.set_adapter("amazon")
    fill(model, TASKS[:2])
    expected = summed(base, model, TASKS[:2])
    merged = model.merge_and_unload()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)


def test_scales_and_dtypes_that_differ_between_adapters(fresh_seed: int):
    base, model = chain("llama")
    fill(model, TASKS, seed=fresh_seed)
    for index, layer in enumerate(model.base_model.lora_layers().values()):
        layer.scaling[TASKS[0]] *= 3
        layer.scaling[CURRENT] = -0.5
        if index % 2:
            layer.lora_A[TASKS[0]].to(torch.bfloat16)
            layer.lora_B[TASKS[0]].to(torch.bfloat16)
    model.merge_adapter()
    for name, layer in model.base_model.lora_layers().items():
        parts = [(layer.scaling[n], layer.lora_B[n].weight.double(), layer.lora_A[n].weight.double()) for n in TASKS]
        expected = base.get_submodule(name).weight + sum(scale * up @ down for scale, up, down in parts)
        torch.testing.assert_close(layer.base_layer.weight, expected.float(), rtol=0, atol=1e-6)
    model.unmerge_adapter()
    for name, layer in model.base_model.lora_layers().items():
        torch.testing.assert_close(layer.base_layer.weight, base.get_submodule(name).weight, rtol=0, atol=1e-6)


def test_layers_share_the_memory_of_the_stacked_ranks(monkeypatch: pytest.MonkeyPatch, fresh_seed: int):
    made: list[Buffers] = []
    monkeypatch.setattr(active, "Buffers", lambda: made.append(Buffers()) or made[-1])
    _, model = chain("llama")
    model.merge_adapter()
    layers = model.base_model.lora_layers()
    assert len(made) == 1 and len(made[0]._held) < 2 * len(layers)

    buffers = Buffers()
    generator = torch.Generator().manual_seed(fresh_seed)
    for dim in (0, 1):
        parts = [torch.randn(6, 6, generator=generator) for _ in range(3)]
        first = buffers.cat(parts, dim)
        assert torch.equal(first, torch.cat(parts, dim))
        assert buffers.cat(parts, dim).data_ptr() == first.data_ptr()
