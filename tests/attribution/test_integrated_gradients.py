"""Scores against Captum, what they mean, and the settings: of the reference and of the fast engine."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_aso.attribution import AttributionConfig, attribute, find_neurons, integrated_gradients, similarity
from tests.attribution.reference import answer_probability, captum_scores, largest_gap, run, scaled_positions
from tests.tiny_models import tiny, tiny_batch


@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart", "bert", "bert_mlm"])
def test_scores_are_captums(name: str, padding: str, method: str, fresh_seed: int) -> None:
    # in float64: a draw can cancel so far that Captum itself is 3e-5 off in float32
    model = tiny(name, seed=fresh_seed).double()
    batch = tiny_batch(model, 3, seed=fresh_seed, padding=padding)
    ours = run(model, batch, method, steps=7)
    assert largest_gap(ours.scores, captum_scores(model, batch, steps=7)) <= 1e-5
    assert torch.allclose(ours.log_probability.double(), answer_probability(model, batch).log(), atol=1e-4)
    assert [name for name, _, _ in ours.layout] == [layer.name for layer in find_neurons(model)]
    if method == "reference" and name == "llama":  # the paper's sum is its default
        assert largest_gap(integrated_gradients(model, batch).scores, captum_scores(model, batch, steps=20)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "t5_v11", "bert"])
@pytest.mark.parametrize(("quadrature", "steps", "tolerance"), [("gauss_legendre", 30, 1e-4), ("riemann", 500, 1e-2)])
def test_a_layers_scores_add_up(name: str, quadrature: str, steps: int, tolerance: float) -> None:
    """Completeness: the scores of a layer add up to P with its neurons minus P without them."""
    model = tiny(name, std=0.15)
    batch = tiny_batch(model, 2)
    vector = run(model, batch, steps=steps, quadrature=quadrature)
    for layer in find_neurons(model):
        where = scaled_positions(model, batch, layer.name)
        with torch.no_grad():
            present = answer_probability(model, batch)
            with layer.module.register_forward_pre_hook(lambda _, args, where=where: args[0].masked_fill(where, 0.0)):
                absent = answer_probability(model, batch)
        total = (vector.layer(layer.name).double() * vector.log_scale.double().exp()[:, None]).sum(1)
        assert torch.all((total - (present - absent)).abs() <= tolerance * vector.scores.abs().sum(1).double())


def test_a_long_answer_does_not_vanish() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 64, (2, 48))
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(48) < 4, -100, ids)}
    fast, reference = (run(model, batch, method, steps=4) for method in ("fast", "reference"))
    for vector in (fast, reference):
        assert torch.all(vector.log_probability < -110), "P is 0 in float32"
        assert torch.all(vector.scores == 0) and torch.isfinite(vector.values).all()
        assert torch.all((vector.values != 0).sum(1) > 0.9 * vector.values.shape[1])
    assert torch.all(similarity(fast.values, reference.values) > 0.9999)


@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_precision_and_autocast(name: str, method: str) -> None:
    model = tiny(name, std=0.15)
    batch = tiny_batch(model, 2)
    single = run(model, batch, method)
    assert largest_gap(single.values, run(copy.deepcopy(model).double(), batch, method).values) <= 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(model, batch, method)
    half = run(copy.deepcopy(model).bfloat16(), batch, method)
    for vector in (cast, half):
        assert vector.values.dtype == torch.float32
        assert torch.all(similarity(vector.values, single.values) > 0.95)
    assert not torch.equal(cast.values, single.values), "the caller's autocast was not followed"


def test_manual_neurons_also_outside_the_blocks() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 2)
    name = "model.layers.1.mlp.down_proj"
    chosen = run(model, batch, neurons=["layers.1.mlp.down_proj", "lm_head"])
    assert [name for name, _, _ in chosen.layout] == [name, "lm_head"]
    assert largest_gap(chosen.layer(name), run(model, batch).layer(name)) <= 1e-5
    head = run(model, batch, "reference", neurons=["lm_head"])
    assert largest_gap(chosen.layer("lm_head"), head.values) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_an_adapter_on_the_ffn_itself_in_a_compiled_model(name: str) -> None:
    """The neurons feed base weight and adapter alike, so the scores are those of the merged model."""
    model = tiny(name)
    targets = [layer.name for layer in find_neurons(model)]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    wrapped = get_peft_model(model, config)
    compiled, batch = torch.compile(wrapped, backend="eager"), tiny_batch(model, 2)
    adapted = [run(each, batch, "fast") for each in (wrapped, compiled)] + [run(compiled, batch, "reference")]
    with wrapped.disable_adapter():
        base = run(wrapped, batch, "fast")
    merged = run(wrapped.merge_and_unload(), batch)
    for vector in adapted:
        assert [name for name, _, _ in vector.layout] == targets
        assert largest_gap(vector.values, merged.values) <= 1e-4
    assert largest_gap(base.values, merged.values) > 1e-2


@pytest.mark.parametrize("method", ["auto", "reference"])
def test_what_has_no_scores_is_an_error(method: str) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"attribution of model\.layers\.\d\.mlp\.down_proj has NaN or Inf"):
        run(model, tiny_batch(model, 1), method)
    shared = tiny("llama")
    shared.model.layers[2].mlp = shared.model.layers[1].mlp  # as in ALBERT
    with pytest.raises(ValueError, match="ran 2 times in one forward pass"):
        run(shared, tiny_batch(shared, 1), method)
    with pytest.raises(ValueError, match="method='quick' is not known"):
        run(tiny("llama"), tiny_batch(tiny("llama"), 1), "quick")


@pytest.mark.parametrize("method", ["fast", "reference"])
def test_progress_is_shown_and_cleared(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    config = AttributionConfig(steps=2)
    attribute(model, tiny_batch(model, 1), config, method=method, progress=True)
    shown = capsys.readouterr().err
    assert "attribution" in shown and "/3 [" in shown and shown.endswith("\r")
    attribute(model, tiny_batch(model, 1), config, method=method)
    assert capsys.readouterr().err == ""
