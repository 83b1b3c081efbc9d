"""Export tasks as one plain model folder: base weights plus the sum of adapters, as transformers reads it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..tuner.history import task_name_of
from ..tuner.persistence import tuner_of
from .atomic import replaced_folder
from .errors import ChainError
from .export import README_NAME, biases_of, head_of, layers_of, parts_of, selected_adapters
from .fitting import PREFIX, BaseView
from .lowrank import weighted_sum
from .manifest import MANIFEST_NAME

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (Conv1D, nn.Embedding)  # weights that are kept as (in, out)
_MERGED = (nn.Linear, *_TRANSPOSED, *_CONVOLUTIONS)


@torch.no_grad()
def export_merged(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
) -> Path:
    """Write base weights plus the sum of several tasks' adapters as a plain transformers model folder (Eq. 3).

    Each weight is added up in float32 (the adapters' products in float64) and rounded once, to `dtype`. The model
    itself is not touched. The folder has sharded safetensors, `config.json` and what else
    `save_pretrained` writes; `AutoModel...from_pretrained(folder)`, vLLM and llama.cpp's converter read it. It
    takes its place in one step: if anything fails, what was there stays.

    Args:
        model: a `PeftModel` with ASO_LORA adapters on a transformers model.
        folder: where to; made if it does not exist.
        tasks: which adapters to add up, each alone, without its history. None: the active task and its
            history.
        dtype: of the weights that are written. None: the one that each has in the base model.
        max_shard_size: as in `save_pretrained`.
        tokenizer: saved beside it, if given.

    Returns:
        The folder.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, an adapter that is no sum,
            a base that is quantized or merged already, a folder that holds a chain or an adapter.
        MissingHistoryError: the history of the active task is not loaded.
    """
    tuner = tuner_of(model)
    if tuner is None or not hasattr(tuner.model, "save_pretrained"):
        raise ChainError("export_merged needs a PeftModel with ASO_LORA adapters on a transformers model.")
    if dtype is not None and not dtype.is_floating_point:
        raise ChainError(f"dtype={dtype} is not a floating point type. Use torch.float32, bfloat16 or float16.")
    path = Path(folder)
    if (path / MANIFEST_NAME).exists() or (path / CONFIG_NAME).exists():
        raise ChainError(f"{path} holds a chain of tasks or an adapter. Give another folder.")
    names = selected_adapters(tuner, tasks)
    weights = _weights(tuner, names, dtype)
    plain = _plain_model(tuner.model, weights)
    with replaced_folder(path) as stage:
        plain.save_pretrained(stage, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        (stage / README_NAME).write_text(_readme(tuner, names), encoding="utf-8")
    return path


def _weights(tuner: Any, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """All weights of the merged model, by the names of the base model."""
    view, layers = BaseView.of(tuner.model), layers_of(tuner, names)
    passing = {
        f"{name}.{key}" if name else key
        for name, module in view.modules.items()
        for key in module._non_persistent_buffers_set
    }
    found = {name: tensor.detach() for name, tensor in view.weights.items() if name not in passing}
    found.update({key.removeprefix(PREFIX): value for key, value in head_of(tuner, names).items()})
    biases = biases_of(layers, names)
    for name, layer in tqdm(layers.items(), desc="Merging", unit="module", leave=False):
        base: Any = layer.get_base_layer()
        plain = isinstance(base, _MERGED) and type(base.weight.data) is torch.Tensor
        if layer.merged:
            raise ChainError(f"The adapters are merged into {name} already. Call model.unmerge_adapter() first.")
        if not plain or not base.weight.is_floating_point():
            kind = f"a {type(base).__name__} with a weight of type {type(base.weight).__name__}"
            raise ChainError(
                f"{name} is {kind}, which cannot be merged in float32. On a quantized base, load the base model "
                "in half precision, put the chain on it with load_chain, and export that."
            )
        product = weighted_sum(parts_of(layer, names))
        delta = product.up @ product.down
        delta = delta.T if isinstance(base, _TRANSPOSED) else delta.reshape(base.weight.shape)
        found[f"{name}.weight"] = _sum(found[f"{name}.weight"], delta, dtype)
        if name in biases:
            found[f"{name}.bias"] = _sum(found[f"{name}.bias"], biases[name], dtype)
    if dtype is not None:
        found = {name: each.to(dtype) if each.is_floating_point() else each for name, each in found.items()}
    broken = [name for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ChainError(
            f"{broken[0]} holds NaN or Inf after merging: a training diverged, or the sum is too large for the "
            "type. Nothing was written. Try dtype=torch.float32, or leave a task out with tasks=[...]."
        )
    return found


def _sum(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """In float32, rounded once."""
    return (weight.float() + delta.to(weight.device).float()).to(dtype or weight.dtype)


def _plain_model(base: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model of the base's class with these weights, which are not copied."""
    config = copy.deepcopy(base.config)
    if _came_apart(base, weights):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(base)(config)
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    missing, unexpected = plain.load_state_dict(weights, assign=True, strict=False)
    plain.tie_weights()
    left = [name for name, tensor in plain.state_dict().items() if tensor.is_meta]
    if left or unexpected:
        raise ChainError(
            f"The merged weights do not fit a fresh {type(base).__name__}: {left[:3]} missing, {unexpected[:3]} too "
            "many. Use model.merge_and_unload() and save_pretrained."
        )
    if len(dtypes) == 1:
        plain.config.dtype = dtypes.pop()
    plain.generation_config = getattr(base, "generation_config", None)
    return plain


def _came_apart(base: Any, weights: dict[str, torch.Tensor]) -> bool:
    """Whether weights that are one in the base model are two after merging: an adapter was on one of their modules."""
    shared: dict[int, list[str]] = {}
    for name, tensor in BaseView.of(base).weights.items():
        shared.setdefault(id(tensor), []).append(name)
    groups = ([weights[name] for name in names if name in weights] for names in shared.values())
    return any(not torch.equal(first, other) for group in groups for first in group[:1] for other in group[1:])


def _readme(tuner: Any, names: Sequence[str]) -> str:
    tasks = ", ".join(task_name_of(name, tuner.peft_config[name]) for name in names)
    base = tuner.peft_config[names[-1]].base_model_name_or_path
    return (
        "# One model for several tasks\n\n"
        f"{base or 'The base model'} plus the sum of the LoRA adapters of these tasks, in the order in which they "
        f"were learned: {tasks}. Each weight was added up in float32 and rounded once.\n"
    )
