"""The inputs of a task's LoRA layers: A started in their directions (`initialize_from_inputs`), and those that the
task stores for later ones (`update_input_memory`).

Orthogonality between A's rows protects earlier tasks only where A spans what the inputs span, and an A that has hardly
left its random start does not. What is computed of the inputs are functions of `tuner/starts.py`, `penalties.py` and
`low_rank.py`; this file collects the second moments of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from tqdm.auto import tqdm

from ..attribution import eval_mode, unwrap
from ..tuner.config import INPUT_DIRECTIONS
from ..tuner.layer import adapters_in, low_rank, matrices_of
from ..tuner.starts import STARTS, needs_inputs
from .coefficients import is_untrained, require_tuner

# examples of the training data, from which the Trainer takes the directions
INPUT_EXAMPLES = 64
# second moments in memory at one time, in bytes; more layers take another pass over the batches
_MEMORY = 1 << 30


def initialize_from_inputs(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, progress: bool = False) -> None:
    """Start the current task's A from the second moments of the task's inputs at each LoRA layer.

    The start is the one that `project_init` names: with `"inputs"`, the leading directions of the inputs outside of
    the span of the history's rows. `ASOTrainer` does this by itself. Call it in a loop of your own before the
    optimizer is made.

    Args:
        model: a PEFT model whose active adapter is the new task, untrained (B is 0).
        batches: collated batches of the task's training data; padding (`attention_mask` 0, labels -100 in a decoder)
            is left out.
        progress: show a progress bar.

    Raises:
        ValueError: no ASO-LoRA adapter, more than one active, a trained one, no batches, layers that are not linear,
            weights sharded by FSDP2, or a history that spans all of a layer's inputs.
        MissingHistoryError: a task of the history is not loaded.
    """
    tuner = require_tuner(model)
    task = tuner.current_task
    tuner.tasks.require([task])
    if tuner.is_sharded:
        raise ValueError(
            "The weights are sharded already. Start A from the inputs before the model is wrapped, as ASOTrainer does."
        )
    layers = tuner.lora_layers([task])
    others = [name for name, layer in layers.items() if not _is_linear(layer, task)]
    if others:
        raise ValueError(
            f"Only linear layers can start from their inputs, and {task!r} has {', '.join(others[:3])} "
            f"({len(others)} in all). Leave them out of target_modules, or use project_init=True."
        )
    if not is_untrained(tuner):
        raise ValueError(
            f"{task!r} has been trained: its B is not 0, and a new A would undo that. Start from the inputs before "
            "the first step, on an adapter with PEFT's default init_lora_weights."
        )
    batches = list(batches)
    if not batches:
        raise ValueError("No batches. Give some of the task's training data, 64 examples or so.")
    config = tuner.peft_config[task]
    start = STARTS[config.project_init if needs_inputs(config.project_init) else "inputs"]
    psi = torch.tensor([sum(value) / len(value) if isinstance(value, list) else value
                        for value in tuner.soft_coefficients.values()])  # fmt: skip
    for group in _groups(layers):
        with eval_mode(unwrap(model)), torch.no_grad():
            moments = _moments(model, group, tqdm(batches, desc="inputs", leave=False, disable=not progress))
            for name, layer in group.items():
                old = adapters_in(layer, tuner.history)
                history, A = [low_rank(layer, each) for each in old], matrices_of(layer, task)[0]
                soft = psi[[tuner.history.index(each) for each in old]]
                A.copy_(start(A.detach(), history, moments.pop(name, None), soft, **config.start_options))


def update_input_memory(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, adapter: str | None = None,
    directions: int | None = None, progress: bool = False,
) -> None:  # fmt: skip
    """Store the leading directions of a task's inputs with its adapter, for later tasks and for merging.

    `ASOTrainer` does this at the end of a task whose config asks for it. Call it for an adapter that was trained
    otherwise, such as a stock LoRA adapter from `load_history`. The model is run as it stood when the task ended. No
    data are stored: of the second moment of each module's inputs the leading eigenvectors, float16, one copy for
    modules with the same input (q and v). They are saved in the adapter's file, `2 * directions * in` bytes an input.

    Args:
        model: a PEFT model with ASO-LoRA adapters.
        batches: collated batches of the task's training data, some 64 examples; padding is left out.
        adapter: whose. None: the active one.
        directions: how many; at most the width of the input. None: `input_directions` of the adapter's config, or 32.
        progress: show a progress bar.

    Raises:
        ValueError: no such adapter, no batches, or `directions` below 1.
        MissingHistoryError: a task of its history is not loaded.
    """
    tuner = require_tuner(model)
    name = adapter or tuner.current_task
    batches = list(batches)
    with tuner.unsharded(), tuner.through(name):
        tuner.tasks.require([name])
        count = directions or tuner.peft_config[name].resolved_input_directions or INPUT_DIRECTIONS
        if not batches or count < 1:
            raise ValueError("Give some batches of the task's training data, and at least one direction.")
        layers = {each: layer for each, layer in tuner.lora_layers([name]).items() if _is_linear(layer, name)}
        for group in _groups(layers):
            with eval_mode(unwrap(model)), torch.no_grad():
                bar = tqdm(batches, desc=f"inputs of {name}", leave=False, disable=not progress)
                found: dict[int, torch.Tensor] = {}
                for module, moment in _moments(model, group, bar).items():
                    if id(moment) not in found:
                        scaled = moment * (len(moment) / moment.trace().clamp(min=torch.finfo(moment.dtype).tiny))
                        values, vectors = torch.linalg.eigh(scaled.float())
                        rows = vectors.T * values.clamp(min=0).sqrt()[:, None]
                        found[id(moment)] = rows.flip(0)[:count].to("cpu", torch.float16).contiguous()
                    group[module].task_inputs[name] = found[id(moment)]
    tuner.refresh_history()


def _is_linear(layer: LoraLayer, adapter: str) -> bool:
    return isinstance(dict(layer.lora_A).get(adapter), nn.Linear)


def _groups(layers: Mapping[str, LoraLayer]) -> Iterator[dict[str, LoraLayer]]:
    """Layers whose second moments, float64 `(in, in)` each, fit into memory together."""
    group: dict[str, LoraLayer] = {}
    size = 0
    for name, layer in layers.items():
        size += 8 * layer.in_features**2
        if group and size > _MEMORY:
            yield group
            group, size = {}, 8 * layer.in_features**2
        group[name] = layer
    yield group


def _moments(model: nn.Module, layers: Mapping[str, LoraLayer], batches: Any) -> dict[str, torch.Tensor]:
    """Layer -> the sum of x x^T over its inputs, float64 `(in, in)`; without layers that were not run.

    Layers that get the same tensor share the sum.
    """
    moments: dict[str, torch.Tensor] = {}
    masks: list[torch.Tensor] = []
    same: dict[str, str] = {}
    last: tuple[str, torch.Tensor | None] = ("", None)

    def add(name: str, x: torch.Tensor) -> None:
        nonlocal last
        if x is last[1] and same.get(name, last[0]) == last[0] and name not in moments:
            same[name] = last[0]
            return
        last = (name, x)
        mask = next((each for each in masks if each.shape == x.shape[:-1]), None)
        rows = x.flatten(0, -2) if mask is None else x[mask]
        rows = rows.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
        moments[name] = moments[name] + rows.T @ rows if name in moments else rows.T @ rows

    bare = unwrap(model)
    device = next(bare.parameters()).device
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            hooks.callback(hook.remove)
        for batch in batches:
            inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            if getattr(bare.config, "is_encoder_decoder", False):
                inputs = _told_apart(inputs)
            masks[:] = _masks(inputs)
            bare(**inputs)
    return {name: moments[same.get(name, name)] for name in layers if same.get(name, name) in moments}


def _told_apart(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of an encoder-decoder in which the two sides differ in length, so that each mask finds its inputs."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None or labels is None or mask.shape != labels.shape:
        return batch
    rest = {name: value for name, value in batch.items() if not name.startswith("decoder_")}  # made from the labels
    return {**rest, "labels": nn.functional.pad(labels, (0, 1), value=-100)}


def _masks(batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """The positions of the model's inputs, and of its decoder's if it has one, that are no padding; bool tensors
    `(batch, length)`."""
    attention, labels = batch.get("attention_mask"), batch.get("labels")
    found = [attention.bool()] if torch.is_tensor(attention) and attention.dim() == 2 else []
    return [*found, labels != -100] if torch.is_tensor(labels) and labels.dim() == 2 else found
