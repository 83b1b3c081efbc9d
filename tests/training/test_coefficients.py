"""w and psi: each setting against the formula written out, and the hand-written loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr, spearmanr

from peft_aso import AttributionConfig, AttributionVector, compute_attribution, load_chain, update_coefficients
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
    return AttributionConfig(**{"steps": 3, "quadrature": "riemann", "probe_size": 8, **settings})


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
    expected = sum(spearmanr(o, n).statistic for o, n in zip(old.numpy(), new.numpy(), strict=True)) / len(old)
    assert result.similarities["one"] == pytest.approx(expected, abs=1e-6)


def test_mean_vectors_absolute_scores_pearson() -> None:
    model = trained_chain(attribution=quick(aggregation="mean", absolute=True, similarity="pearson"))
    batches = probe(model)
    result = update_coefficients(model, batches)
    means = []
    for task in ("one", "new"):
        scores = [compute_attribution(model, batch, adapter=task, steps=3).scores.double() for batch in batches]
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


def test_one_psi_a_layer_comes_back_from_a_folder(tmp_path: Path) -> None:
    model = trained_chain(attribution=quick(granularity="layer"))
    psi = update_coefficients(model, probe(model)).soft_coefficients
    penalty = model.base_model.orthogonality_penalty()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = load_chain(tiny("llama"), tmp_path)
    assert loaded.base_model.soft_coefficients == psi
    torch.testing.assert_close(loaded.base_model.orthogonality_penalty(), penalty)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    config["soft_coefficients"]["one"].pop()  # not one a layer
    (tmp_path / "new" / "adapter_config.json").write_text(json.dumps(config))
    assert set(load_chain(tiny("llama"), tmp_path).base_model.soft_coefficients.values()) == {1.0}


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
    changed = module.history_vectors(model, tuner, batches)["one"].parts[0].rows
    assert not torch.equal(changed, first["one"].parts[0].rows)


SETTINGS = [
    {"aggregation": aggregation, "granularity": granularity, "similarity": method, "absolute": absolute}
    for aggregation in ("per_example", "mean")
    for granularity in ("task", "layer")
    for method, absolute in (("spearman", False), ("pearson", True), ("cosine", False))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_prepared_vectors_give_the_plain_similarities(settings, fresh_seed) -> None:
    """Kept in float32 and compared by products, against each pair compared from scratch in float64."""
    import peft_aso.training.coefficients as module

    chosen = quick(**settings)
    layout = [("h.0", 0, 400), ("h.1", 400, 1100)]
    old, new = (
        AttributionVector(torch.randn(5, 1100).mul(3).round() + noise, torch.randn(5), torch.randn(5), layout)
        for noise in (0, torch.randn(5, 1100) * (torch.rand(5, 1) < 0.5))  # some rows with ties, some without
    )
    found = module.compare(module.comparable(old, chosen), module.comparable(new, chosen), chosen)
    vectors = [v.values if chosen.aggregation == "per_example" else v.mean_vector()[None] for v in (old, new)]
    a, b = ((v.abs() if chosen.absolute else v).double().numpy() for v in vectors)
    plain = {
        "spearman": lambda x, y: spearmanr(x, y).statistic,
        "pearson": lambda x, y: pearsonr(x, y).statistic,
        "cosine": lambda x, y: 1 - cosine(x, y),
    }[chosen.similarity]
    parts = [slice(0, 1100)] if chosen.granularity == "task" else [slice(0, 400), slice(400, 1100)]
    expected = [sum(plain(x[part], y[part]) for x, y in zip(a, b, strict=True)) / len(a) for part in parts]
    assert found.dtype == torch.float32 and found.dim() == (chosen.granularity == "layer")
    assert found.reshape(-1).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("source", ["current", "stored"])
def test_a_refresh_ranks_the_current_task_s_vectors_only(source: str, monkeypatch) -> None:
    import peft_aso.training.coefficients as module

    model = trained_chain(attribution=quick(source=source))
    for task in ("one", "two"):
        model.base_model.attribution[task] = torch.randn(
            module.attribute(model, model.base_model, task, probe(model)).values.shape[1]
        )
    shapes = []
    original = module.prepare
    monkeypatch.setattr(module, "prepare", lambda x, *args: shapes.append(tuple(x.shape[:-1])) or original(x, *args))
    first = update_coefficients(model, probe(model))
    each = () if source == "stored" else (8,)
    assert shapes == [each] * 3
    again = update_coefficients(model, probe(model))
    assert shapes == [each] * 4
    assert again.similarities == first.similarities
    with torch.no_grad():
        model.base_model.attribution["one"].mul_(-1)
    changed = update_coefficients(model, probe(model))
    if source == "stored":
        assert shapes == [each] * 7
        assert changed.similarities["one"] == pytest.approx(-first.similarities["one"], abs=1e-6)
    else:
        assert shapes == [each] * 5


def test_another_layout_is_an_error() -> None:
    import peft_aso.training.coefficients as module

    chosen = quick()
    vectors = [
        AttributionVector(torch.randn(2, 6), torch.zeros(2), torch.zeros(2), [("a", 0, stop), ("b", stop, 6)])
        for stop in (2, 3)
    ]
    old, new = (module.comparable(vector, chosen) for vector in vectors)
    with pytest.raises(ValueError, match="6 neurons in 2 layers.*Start over"):
        module.compare(old, new, chosen)


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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
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
