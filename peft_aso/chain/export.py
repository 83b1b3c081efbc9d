"""Export merged tasks (Eq. 3) for programs without this package: one stock LoRA adapter, or one merged model."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from ..tuner import ASOLoraModel
from ..tuner.adapter_file import is_finite
from ..tuner.history import adapter_of, chain_obstacles, task_name_of
from ..tuner.layer import UNSUPPORTED_LAYERS, adapters_in, bias_of, low_rank, matrices_of, merged_update
from ..tuner.low_rank import LowRank
from ..tuner.model import tuner_of
from .manifest import MANIFEST_NAME, README_NAME, ChainError, flush, hub_id, staging

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
_LORA_TITLE = "# One LoRA adapter for several tasks"
_MODEL_TITLE = "# One model for several tasks"
_TRANSPOSED = (Conv1D, nn.Embedding)  # weights that are stored as (in, out)
_MERGED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def base_name(key: str) -> str | None:
    """The name in the bare model of a module or weight of the adapted one; None for what adapters have added."""
    if ".lora_" in key or ".modules_to_save" in key:
        return None
    return key.replace(".base_layer", "").replace(".original_module", "")


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a bare model, or of the model inside a PEFT tuner as they were without adapters."""
    names = ((base_name(key), tensor) for key, tensor in model.state_dict(keep_vars=True).items())
    return {name: tensor for name, tensor in names if name is not None}


@torch.no_grad()
def export_lora(
    model: Any, folder: str | os.PathLike[str], *, tasks: Sequence[str] | None = None, max_rank: int | None = None,
    dtype: torch.dtype | None = None, merge: str | Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """Write one stock LoRA adapter that equals several tasks' adapters, merged (Eq. 3).

    The ranks are concatenated, each adapter's scale is folded into its B, and modules of lower rank are padded with
    zeros: one rank, alpha = rank (a scale of 1), no patterns. The logits are those of the merged model. vLLM takes
    ranks up to 512, with `--max-lora-rank` of at least the rank, and neither heads nor LoRA biases.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        folder: where to, and what is returned; made if new. An earlier export is replaced, file by file.
        tasks: which adapters to add up, each alone, without its history. None: the active task and its history.
        max_rank: modules of a higher rank get the best approximation of this rank (truncated SVD); the relative error
            is logged and written into the export's README.md, with that of rounding to `dtype`.
        dtype: of the exported weights. None: the one that the adapters have.
        merge: how the tasks are merged, a registered name or the weight of each task. None: as the last task's config
            has it, which is the sum by default.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, an adapter that is no sum (DoRA
            and others), a layer type that stock PEFT cannot load, a folder that holds a chain or a model.
        MissingHistoryError: the history of the active task is not loaded.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise ChainError("export_lora needs a PeftModel with ASO_LORA adapters.")
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 1):
        raise ChainError(f"max_rank={max_rank!r} must be an integer of at least 1, or None for the exact sum.")
    path = Path(folder)
    _check_target(tuner, path, dtype, _LORA_TITLE)
    names = _selected(tuner, tasks)
    layers = _layers(tuner, names)
    if dtype is None:
        held = [m.dtype for layer in layers.values() for n in adapters_in(layer, names) for m in matrices_of(layer, n)]
        dtype = reduce(torch.promote_types, held)
    biases = _biases(layers, names)

    bar = tqdm(layers.items(), desc="Exporting", unit="module", leave=False)
    with tuner.merging_by(merge, names):
        exact = {name: _merged(tuner, layer, names) for name, layer in bar}
    full_rank = max(len(update.A) for update in exact.values())
    rank = min(full_rank, max_rank or full_rank)
    written, weights = {}, {}
    for name, layer in layers.items():
        A, B = (factor.to("cpu", dtype) for factor in _with_rank(exact[name], rank))
        written[name] = LowRank(A.to(exact[name].A), B.to(exact[name].B))  # as it will be read back
        first_A, first_B = matrices_of(layer, adapters_in(layer, names)[0])
        end_A, end_B = ("embedding_A", "embedding_B") if isinstance(layer, Embedding) else ("A.weight", "B.weight")
        weights[f"{PREFIX}{name}.lora_{end_A}"] = A.reshape(rank, *first_A.shape[1:]).contiguous()
        weights[f"{PREFIX}{name}.lora_{end_B}"] = B.reshape(len(first_B), rank, *first_B.shape[2:]).contiguous()
    _check_finite(weights)
    weights.update({f"{PREFIX}{name}.lora_B.bias": bias.to(dtype) for name, bias in biases.items()})
    weights.update({PREFIX + key: value for key, value in _head(tuner, names).items()})
    config = _config(tuner, names, layers, rank, lora_bias=bool(biases))

    error = _relative_error(exact, written)
    if rank < full_rank:
        logger.warning("export_lora: rank %d instead of %d: relative error %s", rank, full_rank, error)
    served = next((f"`--max-lora-rank {each}`" for each in VLLM_RANKS if each >= rank), "ranks above 512 do not run")
    base = hub_id(config["base_model_name_or_path"])
    base_line = f"base_model: {base}\n" if base else ""
    card = f"""---
{base_line}library_name: peft
tags:
- lora
---

{_LORA_TITLE}

The adapters of these tasks, merged by {_rule(tuner, names, merge)}, oldest first: {_listed(tuner, names)}.

- rank {rank}, alpha {rank} (scale 1) in every module
- relative error against the exact merge, in the Frobenius norm: {error}
- PEFT: `PeftModel.from_pretrained(base_model, <this folder>)`, with {base or "the base model"}
- vLLM: {served}
"""

    def write(stage: Path) -> None:
        save_file(weights, str(stage / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    return _write(path, write, card, last=CONFIG_NAME, title=_LORA_TITLE)


def _merged(tuner: ASOLoraModel, layer: LoraLayer, names: Sequence[str]) -> LowRank:
    """The merged update of one layer in float64, with the scale 1."""
    updates = [low_rank(layer, name) for name in adapters_in(layer, names)]
    if updates[0].A.device.type == "mps":  # has no float64
        updates = [update.to("cpu") for update in updates]
    exact = [update.to(torch.float64) for update in updates]
    merged = merged_update(exact, adapters_in(layer, names), tuner.peft_config)
    return LowRank(merged.A, merged.B * merged.scale)


def _with_rank(update: LowRank, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of that rank: padded with zeros, or the best approximation in the Frobenius norm (Eckart-Young).

    With `B = Q_B R_B` and `A.T = Q_A R_A` the singular values of `B A` are those of `R_B R_A^T`. Each factor gets the
    square roots of the singular values.
    """
    A, B = update.A, update.B
    if len(A) > rank:
        (q_B, r_B), (q_A, r_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        left, values, right = torch.linalg.svd(r_B @ r_A.T)
        roots = values[:rank].sqrt()
        A, B = roots.unsqueeze(1) * (right[: len(roots)] @ q_A.T), q_B @ left[:, : len(roots)] * roots
    return nn.functional.pad(A, (0, 0, 0, rank - len(A))), nn.functional.pad(B, (0, rank - len(A)))


def _norm(update: LowRank) -> float:
    """The Frobenius norm of `B A`."""
    r_B, r_A = torch.linalg.qr(update.B).R, torch.linalg.qr(update.A.T).R
    return float(torch.linalg.matrix_norm(r_B @ r_A.T))


def _relative_error(exact: Mapping[str, LowRank], written: Mapping[str, LowRank]) -> str:
    """||written - exact|| / ||exact|| in the Frobenius norm, in words: over all modules, and of the worst one."""
    norms = {name: _norm(update) for name, update in exact.items()}
    errors = {
        name: _norm(LowRank(torch.cat([written[name].A, each.A]), torch.cat([written[name].B, -each.B], dim=1)))
        for name, each in exact.items()
    }
    relative = {name: error / (norms[name] or 1.0) for name, error in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    total = math.hypot(*errors.values()) / (math.hypot(*norms.values()) or 1.0)
    return f"{total:.2e} over all weights, {relative[worst]:.2e} at worst ({worst})"


def _check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    broken = next((name for name, tensor in weights.items() if not is_finite(tensor)), None)
    if broken is not None:
        raise ChainError(f"{broken} holds NaN or Inf in {weights[broken].dtype}. Try torch.float32 or fewer tasks.")


def _config(
    tuner: ASOLoraModel, names: Sequence[str], layers: Mapping[str, LoraLayer], rank: int, lora_bias: bool
) -> dict[str, Any]:
    """adapter_config.json of a stock LoRA adapter: one rank, a scale of 1, no patterns."""
    last = tuner.peft_config[names[-1]]
    name = last.base_model_name_or_path or tuner.model.__dict__.get("name_or_path") or None
    transposed = any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values())
    heads = list(dict.fromkeys(last.modules_to_save)) if last.modules_to_save else None
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_bias=lora_bias, fan_in_fan_out=transposed, modules_to_save=heads,
        task_type=last.task_type, base_model_name_or_path=name, revision=last.revision, inference_mode=True,
    )  # fmt: skip
    modules = {base_name(name) for name, _ in tuner.model.named_modules()} - {None, ""}
    targets = exact_targets(sorted(layers), [str(name) for name in modules], config)
    values: dict[str, Any] = {**config.to_dict(), "target_modules": targets}
    if last.task_type is None:  # what PEFT writes for its AutoPeftModel
        base = type(tuner.model)
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return values


def exact_targets(wanted: Sequence[str], modules: Sequence[str], config: Any) -> list[str] | str:
    """`target_modules` of a `LoraConfig` that match just the wanted ones of all modules.

    Last names ("q_proj") where these are enough, else full names, else an expression. `ChainError` if stock PEFT
    leaves a module out whatever the names.
    """
    last_names = sorted({name.rpartition(".")[2] for name in wanted})
    candidates: list[list[str] | str] = [last_names, list(wanted), "|".join(map(re.escape, wanted))]
    for candidate in candidates:
        config.target_modules = candidate
        matched = {name for name in modules if check_target_module_exists(config, name)}
        if matched == set(wanted):
            return candidate
    lost, heads = min({*wanted} - matched), config.modules_to_save
    raise ChainError(f"Stock PEFT puts no LoRA adapter on {lost}, in modules_to_save={heads}. Export fewer tasks.")


@torch.no_grad()
def export_merged(
    model: Any, folder: str | os.PathLike[str], *, tasks: Sequence[str] | None = None,
    dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB", tokenizer: Any = None,
    merge: str | Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """Write base weights plus several tasks' adapters, merged, as a transformers model folder (Eq. 3).

    Each weight is added up in float32 (the adapters' products in float64) and rounded once, to `dtype`. The model
    itself is not touched. `AutoModel...from_pretrained(folder)`, vLLM and llama.cpp's converter read the folder.

    Args:
        model: a `PeftModel` with ASO_LORA adapters on a transformers model.
        folder: where to, and what is returned; made if new. An earlier export is replaced, file by file.
        tasks: which adapters to add up, each alone, without its history. None: the active task and its history.
        dtype: of the weights that are written. None: the one that each has in the base model.
        max_shard_size: as in `save_pretrained`.
        tokenizer: saved too, if given.
        merge: as `export_lora`.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, an adapter that is no sum, a
            base that is quantized or merged already, a folder that holds a chain, an adapter or another model.
        MissingHistoryError: the history of the active task is not loaded.
    """
    tuner = tuner_of(model)
    if tuner is None or not hasattr(tuner.model, "save_pretrained"):
        raise ChainError("export_merged needs a PeftModel with ASO_LORA adapters on a transformers model.")
    path = Path(folder)
    _check_target(tuner, path, dtype, _MODEL_TITLE)
    names = _selected(tuner, tasks)
    with tuner.merging_by(merge, names):
        merged = _model_with(tuner.model, _merged_weights(tuner, names, dtype))
    base = tuner.peft_config[names[-1]].base_model_name_or_path
    card = (
        f"{_MODEL_TITLE}\n\n{base or 'The base model'} plus the LoRA adapters of these tasks, merged by "
        f"{_rule(tuner, names, merge)}, in the order in which they were learned: {_listed(tuner, names)}. Each weight "
        "was added up in float32, rounded once.\n"
    )

    def write(stage: Path) -> None:
        merged.save_pretrained(stage, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)

    return _write(path, write, card, last=MODEL_CONFIG_NAME, title=_MODEL_TITLE)


def _merged_weights(tuner: ASOLoraModel, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """All weights of the merged model, by the names of the base model."""
    found = {name: tensor.detach() for name, tensor in base_weights(tuner.model).items()}
    layers = _layers(tuner, names)
    found.update(_head(tuner, names))
    biases = _biases(layers, names)
    for name, layer in tqdm(layers.items(), desc="Merging", unit="module", leave=False):
        base: Any = layer.get_base_layer()
        if layer.merged:
            raise ChainError(f"Adapters are merged into {name} already. Call model.unmerge_adapter() first.")
        weight: Any = getattr(base, "weight", None)
        if not isinstance(base, _MERGED) or type(weight.data) is not torch.Tensor or not weight.is_floating_point():
            raise ChainError(f"{name} has a weight that cannot be merged. Load the base model in half precision.")
        update = _merged(tuner, layer, names)
        delta = update.B @ update.A
        delta = delta.T if isinstance(base, _TRANSPOSED) else delta.reshape(base.weight.shape)
        for key, change in {"weight": delta, "bias": biases.get(name)}.items():
            if change is not None:
                weight = found[f"{name}.{key}"]
                summed = weight.float() + change.to(weight.device).float()
                found[f"{name}.{key}"] = summed.to(dtype or weight.dtype)
    if dtype is not None:
        found = {name: each.to(dtype) if each.is_floating_point() else each for name, each in found.items()}
    _check_finite(found)
    return found


def _model_with(base: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model of the base's class with these weights, which are not copied."""
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)  # of the file that the base was read from, as GGUF's
    tied: dict[int, torch.Tensor] = {}
    for name, tensor in base_weights(base).items():
        if not torch.equal(tied.setdefault(id(tensor), weights[name]), weights[name]):
            config.tie_word_embeddings = False  # one of the two had an adapter
    with torch.device("meta"):
        model = type(base)(config)
    _, unexpected = model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left or unexpected:
        raise ChainError(f"A new {type(base).__name__} has other weights: {[*left, *unexpected]}. Merge with PEFT.")
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.config.dtype = dtypes.pop()
    model.generation_config = getattr(base, "generation_config", None)
    return model


def _check_target(tuner: ASOLoraModel, folder: Path, dtype: torch.dtype | None, title: str) -> None:
    """Refuse a folder from which a chain, an adapter or a model is read that is no earlier export of this kind."""
    bases = {config.base_model_name_or_path for config in tuner.peft_config.values()}
    for base in {*bases, tuner.model.__dict__.get("name_or_path")} - {None, ""}:
        if os.path.exists(base) and folder.exists() and os.path.samefile(base, folder):
            raise ChainError(f"{folder} holds the base model. Give another folder.")
    if dtype is not None and not dtype.is_floating_point:
        raise ChainError(f"dtype={dtype} is not a floating point type. Use torch.float32, bfloat16 or float16.")
    others = [name for name in (MANIFEST_NAME, CONFIG_NAME, MODEL_CONFIG_NAME) if (folder / name).exists()]
    if others and (MANIFEST_NAME in others or title not in _readme(folder)):
        raise ChainError(f"{folder} holds a chain, an adapter or a model ({others[0]}). Give another folder.")


def _readme(folder: Path) -> str:
    path = folder / README_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write(folder: Path, write: Callable[[Path], None], card: str, last: str, title: str) -> Path:
    """Write into a temporary folder and move file by file, `last` at the end; files of an earlier export go.

    A README.md of somebody else stays.
    """
    with staging(folder) as stage:
        write(stage)
        is_own = title in _readme(folder)
        if is_own or not (folder / README_NAME).exists():
            (stage / README_NAME).write_text(card, encoding="utf-8")
        flush(stage)
        (folder / last).unlink(missing_ok=True)  # without it a folder that is half written is not loaded
        for stale in folder.glob("model*.safetensors*") if is_own else ():  # the new export may have other shards
            stale.unlink()
        for name in sorted(os.listdir(stage), key=lambda name: name == last):
            os.replace(stage / name, folder / name)
    flush(folder, deep=False)
    return folder


def _listed(tuner: ASOLoraModel, names: Sequence[str]) -> str:
    return ", ".join(task_name_of(name, tuner.peft_config[name]) for name in names)


def _rule(tuner: ASOLoraModel, names: Sequence[str], merge: Any) -> str:
    chosen = tuner.peft_config[names[-1]].merge if merge is None else merge
    return f"`{chosen}`" if isinstance(chosen, str) else f"weights ({dict(chosen)})"


def _selected(tuner: ASOLoraModel, tasks: Sequence[str] | None) -> list[str]:
    """The adapters to add up, oldest first; the last one's head is the export's."""
    configs = tuner.peft_config
    if tasks is None:
        tuner.tasks.require([tuner.current_task])
        names = tuner.tasks.expand([tuner.current_task])
    else:
        wanted = [tasks] if isinstance(tasks, str) else list(tasks)
        names = [name for name in (adapter_of(task, configs) for task in wanted) if name is not None]
        if not names or len(set(names)) < len(wanted):
            known = ", ".join(repr(task_name_of(name, config)) for name, config in configs.items())
            raise ChainError(f"tasks={wanted}: give each task once, out of those that the model holds: {known}.")
    for name in names:
        pools = ["use_qalora: it pools the layer's input"] if configs[name].use_qalora else []
        for reason in (*chain_obstacles(configs[name]), *pools):
            raise ChainError(f"{name!r} cannot be part of the sum: {reason}. Leave it out with tasks=[...].")
    return names


def _layers(tuner: ASOLoraModel, names: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers on which one of the adapters has weights."""
    layers = tuner.lora_layers(names)
    for name, layer in layers.items():
        if isinstance(layer, UNSUPPORTED_LAYERS) or getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ChainError(f"{name} is a {type(layer).__name__}, which cannot be added up. Give tasks=[...].")
    return layers


def _biases(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Module -> the sum of its scaled LoRA biases (zeros if only others have some); empty if none has."""
    biases = {name: bias_of(layer, names) for name, layer in layers.items()}
    if all(bias is None for bias in biases.values()):
        return {}
    for name, layer in layers.items():
        if isinstance(layer, Embedding):
            raise ChainError(
                f"lora_bias and {name} is an embedding: stock PEFT loads no such adapter. Give tasks=[...]."
            )
    return {
        name: torch.zeros(layers[name].out_features) if bias is None else bias.detach().cpu()
        for name, bias in biases.items()
    }


def _head(tuner: ASOLoraModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights of the last task's modules_to_save, by the base model's names; others cannot be summed."""
    others = [name for name in names[:-1] if tuner.peft_config[name].modules_to_save]
    if others:
        text = f"modules_to_save of {others} are left out of the export, which has those of {names[-1]!r}."
        warnings.warn(text, stacklevel=4)
    return {
        f"{name}.{key}": value.detach().cpu().clone().contiguous()
        for name, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and names[-1] in module.modules_to_save
        for key, value in module.modules_to_save[names[-1]].state_dict().items()
    }
