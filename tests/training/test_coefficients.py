"""w and psi: each setting against scipy on the attribution vectors, and the hand-written loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr, spearmanr

from peft_aso import AttributionConfig, compute_attribution, update_coefficients
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, chain, config, randomize

SCIPY = {
    "spearman": lambda x, y: spearmanr(x, y).statistic,
    "pearson": lambda x, y: pearsonr(x, y).statistic,
    "cosine": lambda x, y: 1 - cosine(x, y),
}


def probe(model: Any, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    return [tiny_batch(model, 4, seed), tiny_batch(model, 4, seed + 1)]


def quick(**settings: Any) -> AttributionConfig:
    return AttributionConfig(**{"steps": 3, "quadrature": "riemann", "probe_size": 8, **settings})


def trained_chain(**settings: Any) -> Any:
    model = chain(tasks=("one", "two", "new"), attribution=quick(**settings))
    randomize(model, "new", seed=11)
    return model


def vectors(model: Any, batches: Any, task: str, alone: bool = False) -> np.ndarray:
    found = [compute_attribution(model, batch, adapter=task, alone=alone, steps=3).scores for batch in batches]
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("aggregation", ["per_example", "mean"])
@pytest.mark.parametrize(
    ("similarity", "model_of", "absolute"),
    [("spearman", "auto", False), ("spearman", "task", False), ("pearson", "auto", True), ("cosine", "auto", False)],
)
def test_w_is_scipys_and_psi_is_one_minus_it(
    similarity: str, model_of: Any, absolute: bool, aggregation: str, granularity: str
) -> None:
    how = {"similarity": similarity, "attribution_model": model_of, "absolute": absolute}
    model = trained_chain(**how, aggregation=aggregation, granularity=granularity)
    batches = probe(model)
    result = update_coefficients(model, batches)
    scores = {task: vectors(model, batches, task, alone=model_of == "task") for task in ("one", "two", "new")}
    if aggregation == "mean":
        scores = {task: each.mean(0, keepdims=True) for task, each in scores.items()}
    if absolute:
        scores = {task: np.abs(each) for task, each in scores.items()}
    layers = [slice(start, stop) for _, start, stop in result.vector.layout]
    for task in ("one", "two"):
        pairs = list(zip(scores[task], scores["new"], strict=True))
        parts = layers if granularity == "layer" else [slice(None)]
        w = np.array([np.mean([SCIPY[similarity](x[part], y[part]) for x, y in pairs]) for part in parts])
        assert np.atleast_1d(result.similarities[task]) == pytest.approx(w, abs=1e-5)
        assert np.atleast_1d(result.soft_coefficients[task]) == pytest.approx(1 - w, abs=1e-5)
    assert model.base_model.soft_coefficients == result.soft_coefficients
    assert result.similarities["one"] != result.similarities["two"]


def test_an_adapter_is_attributed_on_its_history_or_alone() -> None:
    model = trained_chain()
    batch = tiny_batch(model, 4, 0)
    for context, alone in ((model.base_model.through, False), (model.base_model.only, True)):
        with context("two"):
            expected = compute_attribution(model, batch).scores
        found = compute_attribution(model, batch, adapter="two", alone=alone, method="reference").scores
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert model.active_adapter == "new"


@pytest.mark.parametrize(("clip", "psi"), [(False, 2.0), (True, 1.0)])
def test_stored_vectors_are_compared_in_place_of_old_models(clip: bool, psi: float) -> None:
    """And a negative w makes psi larger than 1, unless it is clipped."""
    model = trained_chain(source="stored", clip=clip)
    with pytest.raises(ValueError, match="'one' has none"):
        update_coefficients(model, probe(model))
    model.base_model.attribution.update(one=torch.randn(5), two=torch.randn(5))
    with pytest.raises(ValueError, match="5 neurons"):
        update_coefficients(model, probe(model))
    mean = vectors(model, probe(model), "new").mean(0)
    other = torch.randn(len(mean))
    model.base_model.attribution.update(one=-torch.tensor(mean).float(), two=other)
    result = update_coefficients(model, probe(model))
    assert result.similarities == pytest.approx({"one": -1, "two": spearmanr(other, mean).statistic}, abs=1e-3)
    assert result.soft_coefficients["one"] == pytest.approx(psi, abs=1e-3)


def test_the_vectors_of_the_history_follow_the_probe_and_the_chain() -> None:
    """They are cached: another probe, or other adapters, must not meet those of before."""

    def with_another_two(model: Any) -> Any:
        for task in ("new", "two"):
            model.delete_adapter(task)
        for task in ("two", "new"):
            model.add_adapter(task, config("llama", attribution=quick()))
            randomize(model, task, seed=50)
        model.set_adapter("new")
        return update_coefficients(model, probe(model)).similarities

    model = trained_chain()
    first, other = (update_coefficients(model, probe(model, seed=seed)).similarities for seed in (0, 5))
    assert update_coefficients(trained_chain(), probe(model, seed=5)).similarities == pytest.approx(other, abs=1e-6)
    assert update_coefficients(model, probe(model)).similarities == pytest.approx(first, abs=1e-6)
    assert with_another_two(model) == pytest.approx(with_another_two(trained_chain()), abs=1e-6)


def test_a_first_task_has_no_coefficients() -> None:
    only = chain(tasks=("only",))
    assert update_coefficients(only, probe(only)).similarities == {}


@pytest.mark.parametrize(
    ("settings", "held"),  # the tasks whose psi is 1 before the first step, whatever w is
    [({}, ["two"]), ({"granularity": "layer"}, ["two"]), ({"history": ["one"]}, ["one"]), ({"history": ["two"]}, []),
     ({"attribution_model": "task"}, []), ({"source": "stored"}, [])],
)  # fmt: skip
def test_psi_of_the_task_that_an_untrained_one_equals_starts_at_one(settings: Any, held: Any) -> None:
    """B = 0: the model of "two", so w = 1 says nothing. An update after a step measures it."""
    more = {"history": settings["history"]} if "history" in settings else {}
    how = {name: value for name, value in settings.items() if name != "history"}
    model = chain(tasks=("one", "two", "new"), attribution=quick(**how), **more)
    if "source" in settings:
        for task in ("one", "two"):
            vector = compute_attribution(model, probe(model)[0], adapter=task, steps=3).mean_vector()
            model.base_model.attribution[task] = vector
    result = update_coefficients(model, probe(model))
    saved = model.peft_config["new"]
    for task, w in result.similarities.items():
        w, psi = np.atleast_1d(w), np.atleast_1d(result.soft_coefficients[task])
        assert (psi == 1).all() if task in held else psi == pytest.approx(1 - w, abs=1e-6)
        assert task not in held or w == pytest.approx(1, abs=1e-6)
        assert saved.similarities[task] == result.similarities[task], "w as measured"
    randomize(model, "new", seed=11)
    result = update_coefficients(model, probe(model))
    for task, w in result.similarities.items():
        assert np.atleast_1d(result.soft_coefficients[task]) == pytest.approx(1 - np.atleast_1d(w), abs=1e-6)


def test_a_hand_written_loop() -> None:
    model = chain(tasks=("one", "two"), penalty_weight=1.0, attribution=quick())
    batches = probe(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    psi = []
    for _ in range(2):
        psi.append(update_coefficients(model, batches).soft_coefficients["one"])
        (model.train()(**batches[0]).loss + model.base_model.orthogonality_penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert psi[0] == 1 and 1e-4 < psi[1] < 1


def test_errors() -> None:
    model, batch = chain(), TinyTask(chain()).batch
    with pytest.raises(ValueError, match="probe is empty"):
        update_coefficients(model, [])
    with pytest.raises(ValueError, match="get_peft_model"):
        update_coefficients(tiny("llama"), [])
    for bad, settings, words in (
        (model, {"alone": True}, "[Gg]ive adapter"),
        (tiny("llama"), {"adapter": "one"}, "needs a model with ASO-LoRA adapters"),
        (model, {"adapter": "nope"}, "There is no adapter 'nope'"),
        (model, {"stacks": "both"}, "stacks='both' is not known"),
    ):
        with pytest.raises(ValueError, match=words):
            compute_attribution(bad, batch, **settings)
