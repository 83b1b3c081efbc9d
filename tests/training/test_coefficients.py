"""w and psi: each setting against the formula written out, and the hand-written loop."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from peft_aso import AttributionConfig, compute_attribution, update_coefficients
from peft_aso.training.coefficients import store_attribution
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, chain, randomize


def probe(model, size: int = 4, seed: int = 0):
    return [tiny_batch(model, size, seed), tiny_batch(model, size, seed + 1)]


def trained_chain(tasks=("one", "two", "new"), **settings):
    model = chain(tasks=tasks, **settings)
    randomize(model, tasks[-1], seed=11)
    return model


def quick(**settings):
    return AttributionConfig(steps=3, probe_size=8, **settings)


def test_w_is_the_mean_over_examples_of_spearman_and_psi_is_one_minus_it() -> None:
    model = trained_chain(attribution=quick())
    batches = probe(model)
    result = update_coefficients(model, batches)
    for task in ("one", "two"):
        pairs = []
        for batch in batches:
            old = compute_attribution(model, batch, adapter=task, steps=3).values
            new = compute_attribution(model, batch, adapter="new", steps=3).values
            pairs += [spearmanr(o.numpy(), n.numpy()).statistic for o, n in zip(old, new, strict=True)]
        assert result.similarities[task] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
        assert result.soft_coefficients[task] == pytest.approx(1 - result.similarities[task], abs=1e-6)
    assert model.base_model.soft_coefficients == result.soft_coefficients
    assert result.similarities["one"] != result.similarities["two"]


def test_task_models_are_compared_alone() -> None:
    model = trained_chain(attribution=quick(attribution_model="task"))
    batches = probe(model)
    result = update_coefficients(model, batches)
    with model.base_model.only("one"):
        old = torch.cat([compute_attribution(model, batch, steps=3).values for batch in batches])
    with model.base_model.only("new"):
        new = torch.cat([compute_attribution(model, batch, steps=3).values for batch in batches])
    expected = sum(spearmanr(o, n).statistic for o, n in zip(old.numpy(), new.numpy(), strict=True)) / len(
        old
    )
    assert result.similarities["one"] == pytest.approx(expected, abs=1e-6)


def test_mean_vectors_absolute_scores_pearson() -> None:
    model = trained_chain(attribution=quick(aggregation="mean", absolute=True, similarity="pearson"))
    batches = probe(model)
    result = update_coefficients(model, batches)
    means = []
    for task in ("one", "new"):
        scores = [
            compute_attribution(model, batch, adapter=task, steps=3).scores.double() for batch in batches
        ]
        means.append(torch.cat(scores).mean(0).abs())
    expected = torch.corrcoef(torch.stack(means))[0, 1].item()
    assert result.similarities["one"] == pytest.approx(expected, abs=1e-5)


def test_one_psi_a_layer_weighs_the_modules_of_that_layer() -> None:
    model = trained_chain(attribution=quick(granularity="layer"))
    result = update_coefficients(model, probe(model))
    tuner = model.base_model
    psi = result.soft_coefficients
    assert {task: len(values) for task, values in psi.items()} == {"one": 3, "two": 3}
    expected = 0.0
    for name, layer in tuner.lora_layers().items():
        index = int(name.split("layers.")[1].split(".")[0])
        for task in ("one", "two"):
            product = layer.lora_A[task].weight @ layer.lora_A["new"].weight.T
            expected += (psi[task][index] * product).square().sum().item()
    assert tuner.orthogonality_penalty().item() == pytest.approx(expected, rel=1e-5)


def test_clipping_keeps_psi_in_range() -> None:
    free, clipped = trained_chain(attribution=quick()), trained_chain(attribution=quick(clip=True))
    similarities = {"one": -0.4, "two": 0.3}

    def fake(old, new, settings):
        return torch.tensor(similarities[old])

    import peft_aso.training.coefficients as module

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "compare", fake)
    patch.setattr(module, "history_vectors", lambda *_: {"one": "one", "two": "two"})
    try:
        update_coefficients(free, probe(free))
        update_coefficients(clipped, probe(clipped))
    finally:
        patch.undo()
    assert free.base_model.soft_coefficients == pytest.approx({"one": 1.4, "two": 0.7})
    assert clipped.base_model.soft_coefficients == pytest.approx({"one": 1.0, "two": 0.7})


def test_stored_vectors_need_no_old_model(monkeypatch) -> None:
    model = trained_chain(attribution=quick(source="stored"))
    for task in ("one", "two"):
        model.set_adapter(task)
        store_attribution(model, probe(model, seed=20))
    model.set_adapter("new")
    import peft_aso.training.coefficients as module

    looked_at = []
    original = module.compute_attribution
    monkeypatch.setattr(
        module, "compute_attribution", lambda *x, **k: looked_at.append(k["adapter"]) or original(*x, **k)
    )
    batches = probe(model)
    result = update_coefficients(model, batches)
    assert set(looked_at) == {"new"}
    new = module.attribute(model, model.base_model, "new", batches).mean_vector()
    expected = spearmanr(model.base_model.attribution["two"].numpy(), new.numpy()).statistic
    assert result.similarities["two"] == pytest.approx(expected, abs=1e-6)
    del model.base_model.attribution["one"]
    with pytest.raises(ValueError, match="'one' has none"):
        update_coefficients(model, batches)


def test_stored_vector_of_other_neurons_is_an_error() -> None:
    model = trained_chain(attribution=quick(source="stored"))
    model.base_model.attribution.update(one=torch.randn(5), two=torch.randn(5))
    with pytest.raises(ValueError, match="5 neurons"):
        update_coefficients(model, probe(model))


def test_history_vectors_follow_the_probe_and_the_weights() -> None:
    import peft_aso.training.coefficients as module

    model = trained_chain(attribution=quick())
    tuner = model.base_model
    batches = probe(model)
    first = module.history_vectors(model, tuner, batches)
    assert module.history_vectors(model, tuner, probe(model)) is first
    other = module.history_vectors(model, tuner, probe(model, seed=5))
    assert other is not first
    randomize(model, "one", seed=77)
    assert not torch.equal(module.history_vectors(model, tuner, batches)["one"].values, first["one"].values)


def test_a_first_task_has_no_coefficients() -> None:
    model = chain(tasks=("only",))
    assert update_coefficients(model, probe(model)).similarities == {}


def test_an_untrained_task_on_top_equals_its_predecessor() -> None:
    """B = 0: the model of the new task is the model of the last one, so w = 1 and psi = 0."""
    model = chain(tasks=("one", "two", "new"), attribution=quick())
    result = update_coefficients(model, probe(model))
    assert result.soft_coefficients["two"] == pytest.approx(0.0, abs=1e-6)
    assert result.soft_coefficients["one"] > 0.01


def test_a_hand_written_loop() -> None:
    model = chain(tasks=("one", "two"), penalty_weight=1.0, attribution=quick())
    tuner = model.base_model
    batches = probe(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    seen = []
    for step in range(4):
        if step % 2 == 0:
            seen.append(update_coefficients(model, batches).soft_coefficients["one"])
        model.train()
        loss = model(**batches[0]).loss + tuner.orthogonality_penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0] == pytest.approx(0.0, abs=1e-6) and seen[1] > 1e-4


def test_errors() -> None:
    model = chain()
    with pytest.raises(ValueError, match="probe is empty"):
        update_coefficients(model, [])
    with pytest.raises(ValueError, match="get_peft_model"):
        update_coefficients(tiny("llama"), [])
    with pytest.raises(ValueError, match="give adapter"):
        compute_attribution(model, TinyTask(model).batch, alone=True)
    with pytest.raises(ValueError, match="needs a model with ASO-LoRA adapters"):
        compute_attribution(tiny("llama"), TinyTask(model).batch, adapter="one")
    with pytest.raises(ValueError, match="There is no adapter 'nope'"):
        compute_attribution(model, TinyTask(model).batch, adapter="nope")
