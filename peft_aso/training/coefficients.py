"""From attribution to the soft coefficients: w (Eq. 13) and psi = 1 - w (Eq. 6).

`update_coefficients` does it for the Trainer and for hand-written loops alike. The history's vectors on the current
task's data cannot change while the task trains: they are computed once and kept.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..attribution import AttributionVector, similarity
from ..tuner import ASOLoraModel
from ..tuner.config import AttributionConfig
from ..tuner.layer import adapters_in, fingerprint
from ..tuner.persistence import tuner_of
from .attribution import compute_attribution

Batches = Sequence[Mapping[str, Any]]

# tuner -> (what the vectors depend on, adapter -> vector): the history's vectors on the current task's probe
_history_vectors: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, AttributionVector]]]
_history_vectors = weakref.WeakKeyDictionary()


@dataclass
class Coefficients:
    """What one update found.

    Attributes:
        similarities: earlier task -> w (Eq. 13); one number, or a list with one a layer.
        soft_coefficients: earlier task -> psi (Eq. 6), likewise.
        vector: the current task's attribution vector on the probe (`None` when it was not computed).
    """

    similarities: dict[str, Any]
    soft_coefficients: dict[str, Any]
    vector: AttributionVector | None


def update_coefficients(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, progress: bool = False
) -> Coefficients:
    """Compute w and psi of the current task on its probe, and set psi in the model.

    Call it before the first step and now and then as the training goes on, with the *same* batches: the history's
    vectors on them are computed at the first call only.

    Args:
        model: a PEFT model with ASO-LoRA adapters; the active one is the current task. Its settings are in
            `model.peft_config[task].attribution`.
        batches: the probe, collated batches with `labels`.
        progress: show a progress bar.

    Returns:
        `Coefficients`, by adapter name of the history. Empty for a first task.

    Raises:
        ValueError: no ASO-LoRA adapter, more than one active, an empty probe, a stored vector of another layout.
        MissingHistoryError: a task of the history is not loaded.
    """
    tuner = require_tuner(model)
    config = tuner.peft_config[tuner.current_task]
    settings: AttributionConfig = config.attribution
    tuner.tasks.require([tuner.current_task])
    if not tuner.history or settings.similarity == "none":
        tuner.set_soft_coefficients(dict.fromkeys(tuner.history, 1.0))
        return Coefficients(dict.fromkeys(tuner.history, 0.0), tuner.soft_coefficients, None)
    batches = list(batches)
    if not batches:
        raise ValueError("The probe is empty: give at least one batch of the current task's training data.")
    history = (
        stored_vectors(tuner)
        if settings.source == "stored"
        else history_vectors(model, tuner, batches, progress)
    )
    current = attribute(model, tuner, tuner.current_task, batches, progress)
    w = {name: compare(history[name], current, settings) for name in tuner.history}
    psi = {name: 1 - value for name, value in w.items()}
    if settings.clip:
        psi = {name: value.clamp(0, 1) for name, value in psi.items()}
    config.attribution_layout = [list(entry) for entry in current.layout]
    similarities = {name: value.tolist() for name, value in w.items()}
    tuner.set_soft_coefficients(psi, layers_of_modules(tuner, config), similarities)
    return Coefficients(similarities, tuner.soft_coefficients, current)


def require_tuner(model: nn.Module) -> ASOLoraModel:
    """The model's `ASOLoraModel`; an error that says how to get one where there is none."""
    tuner = tuner_of(model)
    if tuner is None:
        raise ValueError(
            f"This {type(model).__name__} has no ASO-LoRA adapter. Make one with "
            "`model = get_peft_model(model, ASOLoraConfig(...), adapter_name=<task>)`."
        )
    return tuner


def store_attribution(model: nn.Module, batches: Batches, *, progress: bool = False) -> None:
    """Keep the current task's mean attribution vector on its own data in the model; it is saved with the adapter."""
    tuner = require_tuner(model)
    task = tuner.current_task
    vector = attribute(model, tuner, task, batches, progress)
    tuner.attribution[task] = vector.mean_vector().cpu()
    tuner.peft_config[task].attribution_layout = [list(entry) for entry in vector.layout]


def attribute(
    model: nn.Module, tuner: ASOLoraModel, adapter: str, batches: Batches, progress: bool = False
) -> AttributionVector:
    """The attribution vectors of one task's model on all probe examples, `(examples, N)`."""
    current = tuner.peft_config[tuner.current_task]
    settings = current.attribution
    bar = tqdm(batches, desc=f"attribution of {adapter}", unit="batch", leave=False, disable=not progress)
    vectors = [
        compute_attribution(
            model,
            batch,
            adapter=adapter,
            alone=current.attribution_model == "task",
            steps=settings.steps,
            quadrature=settings.quadrature,
            neurons=settings.neurons,
            stacks=settings.stacks,
            max_rows=settings.max_rows,
            max_answer_tokens=settings.max_answer_tokens,
        )
        for batch in bar
    ]
    return AttributionVector.cat(vectors)


def history_vectors(
    model: nn.Module, tuner: ASOLoraModel, batches: Batches, progress: bool = False
) -> dict[str, AttributionVector]:
    """The vectors of each earlier task's model on the current task's probe, computed once a task and kept."""
    config = tuner.peft_config[tuner.current_task]
    weights = tuple(
        fingerprint(layer, adapters_in(layer, tuner.history)) for layer in tuner.lora_layers().values()
    )
    key = (tuner.history, config.attribution_model, repr(config.attribution), digest(batches), weights)
    held = _history_vectors.get(tuner)
    if held is None or held[0] != key:
        vectors = {name: attribute(model, tuner, name, batches, progress) for name in tuner.history}
        held = _history_vectors[tuner] = (key, vectors)
    return held[1]


def digest(batches: Batches) -> str:
    """Tells one probe from another: a hash of all its tensors."""
    hasher = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, torch.Tensor):
                array = value.detach().cpu().contiguous()
                hasher.update(f"{name}{tuple(array.shape)}{array.dtype}".encode())
                hasher.update(
                    array.view(torch.uint8).numpy().tobytes() if array.dim() else str(array.item()).encode()
                )
    return hasher.hexdigest()


def stored_vectors(tuner: ASOLoraModel) -> dict[str, torch.Tensor]:
    """The vectors that travel with the history's adapters, `(N,)` each.

    Raises:
        ValueError: an adapter has none (a stock LoRA adapter taken in as history, say).
    """
    for name in tuner.history:
        if name not in tuner.attribution:
            raise ValueError(
                f"source='stored' needs an attribution vector with each earlier task, and {name!r} has none: it was "
                "not trained with ASOTrainer. Use AttributionConfig(source='current')."
            )
    return {name: tuner.attribution[name] for name in tuner.history}


def compare(
    old: AttributionVector | torch.Tensor, new: AttributionVector, settings: AttributionConfig
) -> torch.Tensor:
    """w of Eq. 13 between an earlier task and the current one.

    Args:
        old: the earlier task's vectors on the same examples, or its stored mean vector `(N,)`.
        new: the current task's vectors.

    Returns:
        A float32 scalar, or `(L,)` with one w for each layer.

    Raises:
        ValueError: the two have another layout.
    """
    if isinstance(old, AttributionVector):
        new.check_layout(old)
    elif old.shape[-1] != new.layout[-1][2]:
        raise ValueError(
            f"The stored attribution vector of an earlier task has {old.shape[-1]} neurons, this model "
            f"{new.layout[-1][2]}: it was computed with other `neurons`/`stacks`, or for another base model. Use the "
            "same settings, or AttributionConfig(source='current')."
        )
    per_example = settings.aggregation == "per_example" and isinstance(old, AttributionVector)
    a: torch.Tensor
    b: torch.Tensor
    if isinstance(old, AttributionVector):
        a, b = (old.values, new.values) if per_example else (old.mean_vector(), new.mean_vector())
    else:
        a, b = old, new.mean_vector()
    a = a.to(b.device)
    if settings.absolute:
        a, b = a.abs(), b.abs()
    if settings.granularity == "task":
        w = similarity(a, b, settings.similarity)
    else:
        slices = new.slices().values()
        w = torch.stack(
            [similarity(a[..., part], b[..., part], settings.similarity) for part in slices], dim=-1
        )
    return (w.mean(0) if per_example else w).float().cpu()


def layers_of_modules(tuner: ASOLoraModel, config: Any) -> dict[str, int] | None:
    """LoRA module -> the FFN layer of the same block (its place in the layout); `None` with one psi a task.

    Modules outside of all blocks (embeddings, a head) go with the nearest end: the first or the last layer.
    """
    if config.attribution.granularity == "task":
        return None
    blocks = [block_of(entry[0]) for entry in config.attribution_layout]
    result = {}
    for name in tuner.lora_layers():
        inside = [index for index, block in enumerate(blocks) if f"{name}.".startswith(block)]
        head = "head" in name or "score" in name or "classifier" in name
        result[name] = inside[0] if inside else len(blocks) - 1 if head else 0
    return result


def block_of(name: str) -> str:
    """`"model.layers.3.mlp.down_proj"` -> `"model.layers.3."`: the name up to its first number."""
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) + "." if numbered else f"{name}."
