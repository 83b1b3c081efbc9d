"""A started in the directions of the task's own inputs, outside of the history's span.

Orthogonality between A's rows protects earlier tasks only where A spans what the inputs span, and an A that has hardly
left its random start does not. Here A's rows are the leading directions of each layer's inputs (as in PEFT's EVA),
found after the span of the history's rows is taken out. With A fixed there (`train_a=False`) the update B A x is 0 for
every x in the span of the history's rows, however B trains. InfLoRA (Liang and Li, CVPR 2024) starts and fixes its
adapters in this way too, from a memory of earlier inputs; here the history's rows stand for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from tqdm.auto import tqdm

from ..attribution import unwrap
from ..attribution.quiet import undisturbed
from ..tuner import ASOLoraModel
from ..tuner.layer import adapters_in, matrices_of, subspace_of
from ..tuner.orthogonality import exact, outside, span
from .coefficients import require_tuner

# of the training data, from which the Trainer takes the directions
INPUT_EXAMPLES = 64
# second moments that are held at once, in bytes; more layers take another pass over the batches
_HELD = 1 << 30

Spans = list[tuple[torch.Tensor, float]]  # an orthonormal basis (k, in), and how much of it is taken out


def initialize_from_inputs(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    project: float | Mapping[str, float] = 1.0,
    progress: bool = False,
) -> None:
    """Start the current task's A in the leading directions of the task's inputs, outside of the history's span.

    Each input x of a layer counts as x - p_t Q_t^T Q_t x for each earlier task t, Q_t an orthonormal basis of the rows
    of its A. The rows of the new A are the leading eigenvectors of the sum of x x^T, orthonormal, strongest first;
    where the inputs have fewer directions than A has rows, the rest are random ones outside of both. `ASOTrainer` does
    this by itself with `project_init="inputs"`. Call it in a loop of your own before the optimizer is made.

    Args:
        model: a PEFT model whose active adapter is the new task, untrained (B is 0).
        batches: collated batches of the task's training data; padding (`attention_mask` 0, labels -100 in a decoder)
            is left out.
        project: p_t, from 0 (the history is let in) to 1 (kept out): one number, or one for each earlier adapter.
        progress: show a progress bar.

    Raises:
        ValueError: no ASO-LoRA adapter, more than one active, a trained one, no batches, layers that are not linear,
            weights sharded by FSDP2, a `project` that is not from 0 to 1 or lacks an earlier adapter, or a history
            that spans all of a layer's inputs.
        MissingHistoryError: a task of the history is not loaded.
    """
    tuner = require_tuner(model)
    task = tuner.current_task
    tuner.tasks.require([task])
    layers = _layers(tuner, task)
    if not is_untrained(tuner):
        raise ValueError(
            f"{task!r} has been trained: its B is not 0, and a new A would undo that. Start from the inputs before "
            "the first step, on an adapter with PEFT's default init_lora_weights."
        )
    batches = list(batches)
    if not batches:
        raise ValueError("No batches: give some of the task's training data, 64 examples or so.")
    parts = _parts(tuner, project)
    spans = {name: _spans(layer, parts) for name, layer in layers.items()}
    groups = list(_groups(layers))
    bar = tqdm(total=len(groups) * len(batches), desc="inputs", unit="batch", leave=False, disable=not progress)
    with undisturbed(unwrap(model)), torch.no_grad(), bar:
        for group in groups:
            moments = _moments(model, batches, {name: (layers[name], spans[name]) for name in group}, bar)
            for name in group:
                _start(layers[name], task, moments.pop(name, None), spans[name])


def is_untrained(tuner: ASOLoraModel) -> bool:
    """Whether the current task's B is 0 everywhere, as PEFT starts it."""
    task = tuner.current_task
    return not any(bool(matrices_of(layer, task)[1].any()) for layer in tuner.lora_layers([task]).values())


def _layers(tuner: ASOLoraModel, task: str) -> dict[str, LoraLayer]:
    tuner.note_sharding()
    if tuner.tasks.sharded:
        raise ValueError(
            "The weights are sharded already: start A from the inputs before the model is wrapped (ASOTrainer does)."
        )
    layers = tuner.lora_layers([task])
    others = [name for name, layer in layers.items() if not isinstance(layer.lora_A._modules.get(task), nn.Linear)]
    if others:
        raise ValueError(
            f"Only linear layers can start from their inputs, and {task!r} has {', '.join(others[:3])} "
            f"({len(others)} in all). Leave them out of target_modules, or use project_init=True."
        )
    return layers


def _parts(tuner: ASOLoraModel, project: float | Mapping[str, float]) -> dict[str, float]:
    """How much of each earlier adapter's span is taken out."""
    each = project if isinstance(project, Mapping) else dict.fromkeys(tuner.history, project)
    lacking = [name for name in tuner.history if name not in each]
    if lacking:
        raise ValueError(f"project= says nothing of {', '.join(map(repr, lacking))}: give a number for each of them.")
    parts = {name: float(each[name]) for name in tuner.history}
    wrong = {name: value for name, value in parts.items() if not 0 <= value <= 1}
    if wrong:
        raise ValueError(f"project={wrong}: give numbers from 0 (the history is let in) to 1 (kept out).")
    return parts


def _spans(layer: LoraLayer, parts: Mapping[str, float]) -> Spans:
    """What is taken out of a layer's inputs: a part of some spans one by one, then the others altogether."""
    here = [name for name in adapters_in(layer, tuple(parts)) if parts[name] != 0]
    wholly = [subspace_of(layer, name) for name in here if parts[name] == 1]
    found = [(span([subspace_of(layer, name)]), parts[name]) for name in here if parts[name] != 1]
    return [*found, (span(wholly), 1.0)] if wholly else found


def _groups(layers: Mapping[str, LoraLayer]) -> Iterator[list[str]]:
    """Layers whose second moments are held at once, float64 `(in, in)` each."""
    group: list[str] = []
    held = 0
    for name, layer in layers.items():
        size = 8 * layer.in_features**2
        if group and held + size > _HELD:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _moments(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], layers: Mapping[str, tuple[LoraLayer, Spans]], bar: Any
) -> dict[str, torch.Tensor]:
    """Layer -> the sum of x x^T over its inputs, `(in, in)`, without what `Spans` says. None for one that got none."""
    found: dict[str, torch.Tensor] = {}
    masks: list[torch.Tensor] = []

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = outside(_real(inputs, masks), layers[name][1])
        found[name] = found[name] + rows.T @ rows if name in found else rows.T @ rows

    with _watching({name: layer for name, (layer, _) in layers.items()}, add):
        bare = unwrap(model)
        device = next(bare.parameters()).device
        for batch in batches:
            here = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            if getattr(bare.config, "is_encoder_decoder", False):
                here = _told_apart(here)
            masks[:] = _masks(here)
            bare(**here)
            bar.update()
    return found


def _told_apart(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of an encoder-decoder in which both sides have another length, so that each mask finds its inputs."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None or labels is None or mask.shape != labels.shape:
        return batch
    kept = {name: value for name, value in batch.items() if not name.startswith("decoder_")}  # made from the labels
    return {**kept, "labels": nn.functional.pad(labels, (0, 1), value=-100)}


def _masks(batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Where the inputs of the model, and of its decoder if it has one, are real; bool, `(batch, length)` each."""
    found = []
    if torch.is_tensor(mask := batch.get("attention_mask")) and mask.dim() == 2:
        found.append(mask.bool())
    if torch.is_tensor(labels := batch.get("labels")) and labels.dim() == 2:
        found.append(labels != -100)
    return found


def _real(inputs: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows that are no padding, `(n, in)`, float64."""
    mask = next((each for each in masks if each.shape == inputs.shape[:-1]), None)
    return exact(inputs.flatten(0, -2) if mask is None else inputs[mask])


@contextmanager
def _watching(layers: Mapping[str, LoraLayer], add: Any) -> Iterator[None]:
    """Inside the context `add(name, inputs)` is called for each input of these layers."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            stack.callback(hook.remove)
        yield


def _start(layer: LoraLayer, task: str, moment: torch.Tensor | None, spans: Spans) -> None:
    """Write the leading directions into A, and random ones outside of them and the history's where they do not do."""
    matrix = subspace_of(layer, task)
    rank, kept_out = len(matrix), [each for each in spans if each[1] == 1]
    random = exact(matrix)
    rows = random[:0]
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment)
        seen = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        found = vectors.T[seen].flip(0)[:rank].to(rows)
        # inputs that all lie in the history's span leave nothing but what rounding adds
        rows = found[outside(found, kept_out).norm(dim=1) > 0.5]
    if len(rows) < rank:
        taken = [*kept_out, (rows, 1.0)]
        rest = span([outside(random, taken)])
        rows = torch.cat([rows, rest[outside(rest, taken).norm(dim=1) > 0.5]])[:rank]
    if len(rows) < rank:
        raise ValueError(
            f"The history's rows leave {len(rows)} of a layer's {matrix.shape[1]} input dimensions to {task!r}, which "
            f"has rank {rank}. Use smaller ranks, or leave project_init off."
        )
    matrix.copy_(rows)
