"""From attribution to the soft coefficients: w (Eq. 13) and psi = 1 - w (Eq. 6).

`update_coefficients` does it for the Trainer and for hand-written loops alike. The history's vectors on the current
task's data cannot change while the task trains: they are computed, ranked and centred once and kept, so that a refresh
ranks the current task's vectors only.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm

from ..attribution import AttributionVector, Layout, Prepared, prepare, similarity
from ..tuner import ASOLoraModel
from ..tuner.config import AttributionConfig
from ..tuner.kept import tensor_state
from ..tuner.layer import adapters_in, fingerprint
from ..tuner.persistence import tuner_of
from ..tuner.psi import layers_of_blocks
from .attribution import compute_attribution

Batches = Sequence[Mapping[str, Any]]


@dataclass
class Comparable:
    """Attribution vectors of one model, ranked or centred once, so that each comparison with them is a product.

    Attributes:
        parts: what `prepare` made of all neurons, or of each layer's (`granularity="layer"`); rows `(examples, size)`
            with `aggregation="per_example"`, else `(size,)`, float32.
        layout: the neurons; None for a stored vector, which is known by its length alone.
        neurons: how many there are.
    """

    parts: list[Prepared]
    layout: Layout | None
    neurons: int


# tuner -> (what the vectors depend on, adapter -> vectors): the history's, on the current task's probe or as stored
_history_vectors: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Comparable]]]
_history_vectors = weakref.WeakKeyDictionary()


@dataclass
class Coefficients:
    """What one update found.

    Attributes:
        similarities: adapter of an earlier task -> w (Eq. 13); one number, or a list with one a layer.
        soft_coefficients: adapter of an earlier task -> psi (Eq. 6), likewise.
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
        ValueError: no ASO-LoRA adapter, more than one active, merged adapters, an empty probe, a batch that
            attribution cannot read (as `compute_attribution`); with `source="stored"` an earlier task without a stored
            vector, or with one of another number of neurons.
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
    stored = settings.source == "stored"
    if stored:
        require_stored(tuner)
        current = attribute(model, tuner, tuner.current_task, batches, progress)
        history = stored_vectors(tuner, current)
    else:
        history = history_vectors(model, tuner, batches, progress)
        current = attribute(model, tuner, tuner.current_task, batches, progress)
    new = comparable(current, settings, per_example=not stored)
    w = {name: compare(history[name], new, settings) for name in tuner.history}
    psi = {name: 1 - value for name, value in w.items()}
    if settings.clip:
        psi = {name: value.clamp(0, 1) for name, value in psi.items()}
    config.attribution_layout = [list(entry) for entry in current.layout]
    similarities = {name: value.tolist() for name, value in w.items()}
    tuner.set_soft_coefficients(psi, layers_of_modules(tuner, config), similarities)
    return Coefficients(similarities, tuner.soft_coefficients, current)


def agree(tuner: ASOLoraModel) -> None:
    """All processes take the first one's psi and w of the current task: theirs may differ in the last digits."""
    config = tuner.peft_config[tuner.current_task]
    found = broadcast_object_list([tuner.soft_coefficients, config.similarities])
    tuner.set_soft_coefficients(found[0], layers_of_modules(tuner, config), found[1])


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
    with tuner.unsharded():
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
) -> dict[str, Comparable]:
    """The vectors of each earlier task's model on the current task's probe, computed and ranked once a task and kept.

    The ranks take the place of the vectors: float32 `(examples, N)` for each task, or `(N,)` for means.
    """
    config = tuner.peft_config[tuner.current_task]
    if config.resolved_penalty_weight > 0:
        tuner.gather_history()  # the first penalty moves the history's rows, and the key below would see that
    weights = tuple(fingerprint(layer, adapters_in(layer, tuner.history)) for layer in tuner.lora_layers().values())
    key = (tuner.history, config.attribution_model, repr(config.attribution), digest(batches), weights)
    held = _history_vectors.get(tuner)
    if held is None or held[0] != key:
        _history_vectors.pop(tuner, None)  # the old ones are gone before there are new ones
        vectors = {
            name: comparable(attribute(model, tuner, name, batches, progress), config.attribution)
            for name in tuner.history
        }
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
                hasher.update(array.view(torch.uint8).numpy().tobytes() if array.dim() else str(array.item()).encode())
    return hasher.hexdigest()


def require_stored(tuner: ASOLoraModel) -> None:
    """Raise ValueError unless each task of the history has a stored vector (a stock LoRA adapter has none, say)."""
    for name in tuner.history:
        if name not in tuner.attribution:
            raise ValueError(
                f"source='stored' needs an attribution vector with each earlier task, and {name!r} has none: it was "
                "not trained with ASOTrainer, or attribution could not read its examples. Use "
                "AttributionConfig(source='current')."
            )


def stored_vectors(tuner: ASOLoraModel, current: AttributionVector) -> dict[str, Comparable]:
    """The vectors that travel with the history's adapters, ranked once and kept until one of them changes.

    Raises:
        ValueError: one of them has not the neurons of `current`.
    """
    layout, device = current.layout, current.values.device
    settings = tuner.peft_config[tuner.current_task].attribution
    vectors = {name: tuner.attribution[name] for name in tuner.history}
    for vector in vectors.values():
        _check_count(vector.shape[-1], layout[-1][2])
    states = [tensor_state(vector) for vector in vectors.values()]
    key = (tuner.history, "stored", repr(settings), layout, device, states)
    held = _history_vectors.get(tuner)
    if held is None or held[0] != key:
        found = {
            name: Comparable(_parts(vector.to(device), layout, settings), None, vector.shape[-1])
            for name, vector in vectors.items()
        }
        held = _history_vectors[tuner] = (key, found)
    return held[1]


def comparable(vector: AttributionVector, settings: AttributionConfig, per_example: bool = True) -> Comparable:
    """Rank or centre the vectors as the settings say.

    Args:
        per_example: False where the other side is one mean vector (a stored one): this side is then, too, whatever
            the settings' `aggregation`.
    """
    each = per_example and settings.aggregation == "per_example"
    values = vector.values if each else vector.mean_vector()
    return Comparable(_parts(values, vector.layout, settings), vector.layout, values.shape[-1])


def _parts(values: torch.Tensor, layout: Layout, settings: AttributionConfig) -> list[Prepared]:
    """`(..., N)` prepared as a whole, or layer by layer. Kept in float32, which moves w by less than 2e-7."""
    if settings.absolute:
        values = values.abs()
    whole = settings.granularity == "task"
    slices = [slice(None)] if whole else [slice(start, stop) for _, start, stop in layout]
    return [prepare(values[..., part], settings.similarity, torch.float32, "values") for part in slices]


def compare(old: Comparable, new: Comparable, settings: AttributionConfig) -> torch.Tensor:
    """w of Eq. 13 between an earlier task and the current one: a product, as both are ranked already.

    Args:
        old: the earlier task's vectors on the same examples, or its stored mean vector.
        new: the current task's vectors, prepared with the same settings.

    Returns:
        A float32 scalar, or `(L,)` with one w for each layer; the mean over the examples where there are several.

    Raises:
        ValueError: the two have another layout.
    """
    if old.layout is not None and old.layout != new.layout:
        raise ValueError(
            f"The vectors of an earlier task cover {_covered(old)}, those of the current one {_covered(new)}: the "
            "model or its layers have changed under way. Start over with a new model object."
        )
    _check_count(old.neurons, new.neurons)
    w = [similarity(a, b, settings.similarity) for a, b in zip(old.parts, new.parts, strict=True)]
    found = w[0] if settings.granularity == "task" else torch.stack(w, dim=-1)
    per_example = new.parts[0].rows.dim() > 1
    return (found.mean(0) if per_example else found).float().cpu()


def _covered(vectors: Comparable) -> str:
    layout = vectors.layout or []
    return f"{vectors.neurons} neurons in {len(layout)} layers ({', '.join(name for name, _, _ in layout[:2])}, ...)"


def _check_count(stored: int, current: int) -> None:
    if stored != current:
        raise ValueError(
            f"The stored attribution vector of an earlier task has {stored} neurons, this model {current}: it was "
            "computed with other `neurons`/`stacks`, or for another base model. Use the same settings, or "
            "AttributionConfig(source='current')."
        )


def layers_of_modules(tuner: ASOLoraModel, config: Any) -> dict[str, int] | None:
    """LoRA module -> the FFN layer of the same block (its place in the layout); `None` where psi is one number."""
    if config.attribution.granularity == "task" or not config.attribution_layout:
        return None  # without a layout nothing has been compared: psi is 1
    return layers_of_blocks(tuner.lora_layers(), [entry[0] for entry in config.attribution_layout])
