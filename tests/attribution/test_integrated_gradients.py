"""Scores against Captum, what they mean, and the settings."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import scipy.stats
import torch
from captum.attr._utils.approximation_methods import approximation_parameters
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_aso.attribution import find_neurons, integrated_gradients, similarity
from tests.attribution.reference import answer_probability, captum_scores, largest_gap, scaled_positions
from tests.tiny_models import tiny, tiny_batch

Batch = dict[str, torch.Tensor]


def test_captums_right_riemann_sum_is_eq_10() -> None:
    sizes, alphas = approximation_parameters("riemann_right")
    assert alphas(20) == pytest.approx([k / 20 for k in range(1, 21)])
    assert sizes(20) == pytest.approx([1 / 20] * 20)


@pytest.mark.parametrize("method", ["fast", "plain"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart", "bert", "bert_mlm"])
def test_scores_are_captums(name: str, padding: str, method: str, fresh_seed: int) -> None:
    # in float64: a draw can cancel so far that Captum itself is 3e-5 off in float32
    model = tiny(name, seed=fresh_seed).double()
    batch = tiny_batch(model, 3, seed=fresh_seed, padding=padding)
    ours = integrated_gradients(model, batch, steps=7, method=method)
    reference = captum_scores(model, batch, steps=7)
    assert largest_gap(ours.scores, reference) <= 1e-5
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = answer_probability(model, inputs, labels).log()
    assert torch.allclose(ours.log_probability.double(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5_v11", "bert"])
@pytest.mark.parametrize(("quadrature", "steps", "tolerance"), [("gauss_legendre", 30, 1e-4), ("riemann", 500, 1e-2)])
def test_a_layers_scores_add_up(name: str, quadrature: str, steps: int, tolerance: float) -> None:
    """Completeness: the scores of a layer add up to P with its neurons minus P without them."""
    model = tiny(name, std=0.15)
    batch = tiny_batch(model, 2)
    vector = integrated_gradients(model, batch, steps=steps, quadrature=quadrature)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    for layer in find_neurons(model):
        where = scaled_positions(model, batch, layer.name)[..., None]

        def silence(_: nn.Module, args: tuple[torch.Tensor], where: torch.Tensor = where) -> tuple[torch.Tensor]:
            return (args[0].masked_fill(where, 0.0),)

        with torch.no_grad():
            present = answer_probability(model, inputs, batch["labels"])
            hook = layer.module.register_forward_pre_hook(silence)
            absent = answer_probability(model, inputs, batch["labels"])
            hook.remove()
        total = vector.scores[:, vector.slices()[layer.name]].double().sum(1)
        size = vector.scores.abs().sum(1).double()
        assert torch.all((total - (present - absent)).abs() <= tolerance * size)


def test_a_long_answer_does_not_vanish() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 64, (2, 48))
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(48) < 4, -100, ids)}
    vector = integrated_gradients(model, batch, steps=4)
    plain = integrated_gradients(model, batch, steps=4, method="plain")
    assert torch.all(vector.log_probability < -110), "P is 0 in float32"
    assert torch.all(vector.scores == 0)
    assert torch.isfinite(vector.values).all()
    assert torch.all((vector.values != 0).sum(1) > 0.9 * vector.values.shape[1])
    assert torch.all(similarity(vector.values, plain.values) > 0.9999)


def test_float64_is_more_exact_not_different() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 2)
    single = integrated_gradients(model, batch, steps=5)
    double = integrated_gradients(copy.deepcopy(model).double(), batch, steps=5)
    assert largest_gap(single.values, double.values) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_half_precision_and_autocast(name: str) -> None:
    model = tiny(name, std=0.15)
    batch = tiny_batch(model, 2)
    reference = integrated_gradients(model, batch, steps=5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = integrated_gradients(model, batch, steps=5)
    half = integrated_gradients(copy.deepcopy(model).bfloat16(), batch, steps=5)
    for vector in (cast, half):
        assert vector.values.dtype == torch.float32
        assert torch.all(similarity(vector.values, reference.values) > 0.95)
    assert not torch.equal(cast.values, reference.values), "the caller's autocast was not followed"


def test_stacks_of_an_encoder_decoder() -> None:
    model = tiny("t5_v11")
    batch = tiny_batch(model, 2)
    whole = integrated_gradients(model, batch, steps=3)
    for stack in ("encoder", "decoder"):
        part = integrated_gradients(model, batch, steps=3, stacks=stack)
        assert [name for name, _, _ in part.layout] == [n for n, _, _ in whole.layout if n.startswith(stack)]
        expected = torch.cat([whole.layer(name) for name, _, _ in part.layout], 1)
        assert largest_gap(part.values, expected) <= 1e-5
    with pytest.raises(ValueError, match="no FFN neurons in such a stack"):
        integrated_gradients(tiny("llama"), tiny_batch(tiny("llama")), stacks="encoder")


def test_manual_neurons_also_outside_the_blocks() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 2)
    chosen = integrated_gradients(model, batch, steps=3, neurons=["layers.1.mlp.down_proj", "lm_head"])
    assert [name for name, _, _ in chosen.layout] == ["model.layers.1.mlp.down_proj", "lm_head"]
    whole = integrated_gradients(model, batch, steps=3)
    name = "model.layers.1.mlp.down_proj"
    assert largest_gap(chosen.layer(name), whole.layer(name)) <= 1e-5
    head = integrated_gradients(model, batch, steps=3, neurons=["lm_head"], method="plain")
    assert largest_gap(chosen.layer("lm_head"), head.values) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_an_adapter_on_the_ffn_itself(name: str) -> None:
    """The neurons feed base weight and adapter alike, so the scores are those of the merged model."""
    model = tiny(name)
    targets = [layer.name for layer in find_neurons(model)]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    wrapped = get_peft_model(model, config)
    batch = tiny_batch(model, 2)
    adapted = integrated_gradients(wrapped, batch, steps=3, method="fast")
    with wrapped.disable_adapter():
        base = integrated_gradients(wrapped, batch, steps=3, method="fast")
    merged = integrated_gradients(wrapped.merge_and_unload(), batch, steps=3)
    assert [name for name, _, _ in adapted.layout] == targets
    assert largest_gap(adapted.values, merged.values) <= 1e-4
    assert largest_gap(base.values, merged.values) > 1e-2


def test_wrappers_are_looked_through() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 2)
    expected = integrated_gradients(model, batch, steps=3)
    compiled = torch.compile(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), backend="eager")
    vector = integrated_gradients(compiled, batch, steps=3)
    assert vector.layout == expected.layout
    assert largest_gap(vector.values, expected.values) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is a whole number"),
        ({"steps": 2.5}, "steps is a whole number"),
        ({"quadrature": "simpson"}, "quadrature is one of"),
        ({"method": "quick"}, "method is one of"),
        ({"stacks": "top"}, "stacks is one of"),
        ({"max_rows": 0}, "max_rows is at least 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=re.escape(message)):
        integrated_gradients(model, tiny_batch(model, 1), **settings)


def test_gauss_legendre_needs_fewer_steps() -> None:
    model = tiny("llama", std=0.15)
    batch = tiny_batch(model, 2)
    reference = integrated_gradients(model, batch, steps=1000).values
    quick = integrated_gradients(model, batch, steps=8, quadrature="gauss_legendre").values
    riemann = integrated_gradients(model, batch, steps=8).values
    assert largest_gap(quick, reference) < 0.2 * largest_gap(riemann, reference)


def test_nan_weights_are_named() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"attribution of model\.layers\.\d\.mlp\.down_proj has NaN or Inf"):
        integrated_gradients(model, tiny_batch(model, 1), steps=2, method="plain")


def test_weights_shared_by_blocks_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(ValueError, match="ran 2 times in one forward pass"):
        integrated_gradients(model, tiny_batch(model, 1), steps=2, method="plain")


def test_progress_is_shown_and_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    integrated_gradients(model, tiny_batch(model, 1), steps=2, progress=True)
    shown = capsys.readouterr().err
    assert "attribution" in shown and "/3 [" in shown and shown.endswith("\r")
    integrated_gradients(model, tiny_batch(model, 1), steps=2)
    assert capsys.readouterr().err == ""


def test_ranks_of_the_values_are_those_of_the_scores() -> None:
    model = tiny("gpt2")
    vector = integrated_gradients(model, tiny_batch(model, 3), steps=3)
    for values, scores in zip(vector.values, vector.scores, strict=True):
        assert scipy.stats.spearmanr(values, scores).statistic == pytest.approx(1.0)
