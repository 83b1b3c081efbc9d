"""From attribution to the soft coefficients: attribution vectors (Eq. 8-12), w (Eq. 13), psi = 1 - w (Eq. 6)."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..attribution import AttributionConfig, AttributionVector, Layout, attribute, normalized
from ..sharding import full_tensor
from ..tuner import ASOLoraModel
from ..tuner.layer import matrices_of
from ..tuner.model import tuner_of

Batches = Sequence[Mapping[str, Any]]

# tuner -> (what the vectors depend on, adapter -> vectors): the history's, normalized; see `_history_vectors`
_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, list[torch.Tensor]]]] = weakref.WeakKeyDictionary()


@dataclass
class Coefficients:
    """The result of `update_coefficients`.

    Attributes:
        similarities: adapter of an earlier task -> w (Eq. 13); one number, or a list with one a layer.
        soft_coefficients: adapter of an earlier task -> psi (Eq. 6), likewise.
        vector: the current task's attribution vectors on the probe (`None` when they were not computed).
    """

    similarities: dict[str, Any]
    soft_coefficients: dict[str, Any]
    vector: AttributionVector | None


def require_tuner(model: nn.Module) -> ASOLoraModel:
    """The `ASOLoraModel` in a model; ValueError if there is none."""
    tuner = tuner_of(model)
    if tuner is None:
        raise ValueError(
            f"This {type(model).__name__} has no ASO-LoRA adapter. Make one with "
            "`model = get_peft_model(model, ASOLoraConfig(...), adapter_name=<task>)`."
        )
    return tuner


def is_untrained(tuner: ASOLoraModel) -> bool:
    """Whether the current task's B is 0 everywhere, as PEFT starts it."""
    task = tuner.current_task
    return not any(full_tensor(matrices_of(each, task)[1]).any() for each in tuner.lora_layers([task]).values())


# ---- attribution -------------------------------------------------------------------------------------------


def compute_attribution(
    model: nn.Module, batch: Mapping[str, Any], *, adapter: str | None = None, alone: bool = False, steps: int = 20,
    quadrature: str = "riemann", neurons: str | Sequence[str] | None = None, stacks: str = "all",
    max_rows: int | None = None, method: str = "auto", max_answer_tokens: int = 64, progress: bool = False,
) -> AttributionVector:  # fmt: skip
    """Integrated gradients of P(y* given x) with respect to every FFN neuron (Eq. 8-12).

    The model is left as it was: active adapters, training mode, gradients, random state.

    Args:
        model: any transformers model, or a PEFT model.
        batch: a collated batch with `labels` (-100 = not the answer), of any padding; moved to the model's device.
        adapter: the adapter of the task whose model is attributed: base + its history + the adapter. `None`: the model
            with its active adapters.
        alone: base + that adapter only (Eq. 2). Needs `adapter`.
        steps, quadrature, neurons, stacks, max_rows, max_answer_tokens: see `AttributionConfig`.
        method: "auto" (the fast engine where the model allows it), "fast" or "reference".
        progress: show a progress bar.

    Returns:
        `AttributionVector`: `.scores` is Eq. 11, float32 `(batch, N)`; `.log_probability` `(batch,)`;
        `.layout` a list of `(module_name, start, stop)`.

    Raises:
        ValueError: no such adapter, `alone` without one, merged adapters; a setting that is none of its choices; a
            model without FFN neurons; a batch that is refused: no answer tokens, a longer answer than
            `max_answer_tokens`, labels on the prompt, several examples packed into a row.
        FastPathUnsupported: with `method="fast"`, where the model or the batch does not allow it.
        MissingHistoryError: a task of the adapter's history is not loaded.
    """
    choice: Any = {"quadrature": quadrature, "stacks": stacks, "steps": steps, "max_rows": max_rows}
    names = neurons if neurons is None or isinstance(neurons, str) else list(neurons)
    config = AttributionConfig(neurons=names, max_answer_tokens=max_answer_tokens, **choice)
    with _task_model(model, adapter, alone):
        return attribute(model, batch, config, method=method, progress=progress)


@contextmanager
def _task_model(model: nn.Module, adapter: str | None, alone: bool) -> Iterator[None]:
    """Inside the context the model is the one of `adapter`: with its history, or alone (Eq. 2)."""
    if adapter is None and alone:
        raise ValueError("alone=True needs an adapter. Give adapter=<name>.")
    tuner = tuner_of(model)
    if tuner is None:
        if adapter is not None:
            raise ValueError(
                f"adapter={adapter!r} needs a model with ASO-LoRA adapters, and this is a {type(model).__name__}. "
                "Leave adapter out to attribute the model with its active adapters."
            )
        yield
        return
    chosen = nullcontext() if adapter is None else tuner.only(adapter) if alone else tuner.through(adapter)
    with tuner.unsharded(), chosen, tuner.folded():
        yield


def attribution_of(
    model: nn.Module, adapter: str, batches: Batches, config: AttributionConfig, *, progress: bool = False
) -> AttributionVector:
    """The attribution vectors `(examples, N)` of one task's model on all examples of the probe.

    The current task's `attribution_model` decides between the cumulative model and Eq. 2.
    """
    tuner = require_tuner(model)
    alone = tuner.peft_config[tuner.current_task].attribution_model == "task"
    bar = tqdm(batches, desc=f"attribution of {adapter}", unit="batch", leave=False, disable=not progress)
    with _task_model(model, adapter, alone):
        return AttributionVector.cat([attribute(model, batch, config) for batch in bar])


# ---- w and psi ---------------------------------------------------------------------------------------------


def update_coefficients(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, progress: bool = False
) -> Coefficients:
    """Compute w and psi of the current task on its probe, and set psi in the model.

    Call it before the first step and now and then as the training goes on, with the *same* batches: the history's
    vectors on them are computed at the first call only. An untrained task (B = 0) is the model of the task before it:
    their w is 1 whatever the task is, so their psi is 1 until a call after some training measures it.

    Args:
        model: a PEFT model with ASO-LoRA adapters; the active one is the current task. Its settings are in
            `model.peft_config[task].attribution`.
        batches: the probe, collated batches with `labels`.
        progress: show a progress bar.

    Returns:
        `Coefficients`, by adapter name of the history. Empty for a first task.

    Raises:
        ValueError: no ASO-LoRA adapter, more than one active, merged adapters, an empty probe, a batch that
            attribution cannot read (as `compute_attribution`); with `source="stored"` an earlier task without a stored
            vector, or with one of another number of neurons.
        MissingHistoryError: a task of the history is not loaded.
    """
    tuner = require_tuner(model)
    task, history = tuner.current_task, tuner.history
    config = tuner.peft_config[task]
    settings: AttributionConfig = config.attribution
    tuner.tasks.require([task])
    if not history or settings.similarity == "none":
        tuner.set_soft_coefficients(dict.fromkeys(history, 1.0))
        return Coefficients(dict.fromkeys(history, 0.0), tuner.soft_coefficients, None)
    batches = list(batches)
    if not batches:
        raise ValueError("The probe is empty. Give at least one batch of the current task's training data.")
    for name in history if settings.source == "stored" else ():
        if name not in tuner.attribution:  # a stock LoRA adapter has none, say
            raise ValueError(
                f"source='stored' needs an attribution vector with each earlier task, and {name!r} has none: it was "
                "not trained with ASOTrainer, or attribution could not read its examples. Use "
                "AttributionConfig(source='current')."
            )
    current = attribution_of(model, task, batches, settings, progress=progress)
    per_example = settings.aggregation == "per_example" and settings.source == "current"
    values = current.values if per_example else current.mean_vector()
    new = [part.double() for part in _normalized(values, current.layout, settings)]
    w = {}
    for name, old in _history_vectors(model, batches, current.layout, progress).items():
        each = torch.stack([(a * b).sum(-1) for a, b in zip(old, new, strict=True)], dim=-1)
        mean = each.mean(0) if per_example else each
        w[name] = mean if settings.granularity == "layer" else mean[0]
    psi = {name: 1 - value for name, value in w.items()}  # Eq. 6
    if settings.clip:
        psi = {name: value.clamp(0, 1) for name, value in psi.items()}
    if settings.source == "current" and config.attribution_model == "cumulative" and is_untrained(tuner):
        same = [name for name in history if set(tuner.tasks.expand([name])) == set(history)]
        psi.update({name: torch.ones_like(psi[name]) for name in same})
    config.attribution_layout = [list(entry) for entry in current.layout]
    similarities = {name: value.float().tolist() for name, value in w.items()}
    coefficients = {name: value.float().tolist() for name, value in psi.items()}
    tuner.set_soft_coefficients(coefficients, similarities=similarities)
    return Coefficients(similarities, tuner.soft_coefficients, current)


def _history_vectors(
    model: nn.Module, batches: Batches, layout: Layout, progress: bool
) -> dict[str, list[torch.Tensor]]:
    """Earlier task -> its normalized vectors on the current task's probe, or its stored vector (`source="stored"`).

    They cannot change while the task trains, so they are computed once and cached.
    """
    tuner = require_tuner(model)
    config = tuner.peft_config[tuner.current_task]
    settings: AttributionConfig = config.attribution
    key = (tuner.tasks.generation, tuner.history, config.attribution_model, repr(settings), _hash(batches))
    cached = _CACHE.get(tuner)
    if cached is None or cached[0] != key:
        _CACHE.pop(tuner, None)  # frees the old vectors before new ones are made
        vectors = {}
        for name in tuner.history:
            if settings.source == "stored":
                values = tuner.attribution[name]
                if len(values) != layout[-1][2]:
                    raise ValueError(
                        f"The stored attribution vector of {name!r} has {len(values)} neurons, and this model has "
                        f"{layout[-1][2]}: it was computed with other `neurons` or `stacks`, or for another base "
                        "model. Use the same settings, or AttributionConfig(source='current')."
                    )
            else:
                found = attribution_of(model, name, batches, settings, progress=progress)
                values = found.values if settings.aggregation == "per_example" else found.mean_vector()
            vectors[name] = _normalized(values, layout, settings)
        cached = _CACHE[tuner] = (key, vectors)
    return cached[1]


def _normalized(values: torch.Tensor, layout: Layout, settings: AttributionConfig) -> list[torch.Tensor]:
    """Vectors `(..., N)` ranked or centred and divided by their norm, float32; one part, or one for each layer.

    The product of two of them is w (Eq. 13). float32 halves the memory and changes w by less than 2e-7.
    """
    if settings.absolute:
        values = values.abs()
    parts = [slice(start, stop) for _, start, stop in layout] if settings.granularity == "layer" else [slice(None)]
    return [normalized(values[..., part], settings.similarity).float().cpu() for part in parts]


def _hash(batches: Batches) -> str:
    """SHA-256 of all tensors of the probe."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                array = value.detach().cpu().contiguous().flatten()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(array.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
