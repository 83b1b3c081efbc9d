"""Export the sum of tasks (Eq. 3) for programs without this package: one stock LoRA adapter, or one merged model."""

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
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from ..tuner import ASOLoraModel
from ..tuner.history import adapter_of, chain_obstacles, task_name_of
from ..tuner.layer import UNSUPPORTED_LAYERS, adapters_in, low_rank, matrices_of
from ..tuner.low_rank import MERGES, LowRank
from ..tuner.model import tuner_of
from .manifest import MANIFEST_NAME, ChainError, flush, staging

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
README_NAME = "README.md"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
_LORA_TITLE = "# One LoRA adapter for several tasks"
_MODEL_TITLE = "# One model for several tasks"
_TRANSPOSED = (Conv1D, nn.Embedding)  # weights that are stored as (in, out)
_MERGED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class BaseView(NamedTuple):
    """A base model as it was before PEFT put anything into it.

    Attributes:
        modules: name -> module; of an adapted layer the base layer, of a copied head the original.
        weights: name -> parameter or buffer.
    """

    modules: dict[str, nn.Module]
    weights: dict[str, torch.Tensor]


def base_view(model: nn.Module) -> BaseView:
    """The view of a bare model, or of the model inside a PEFT tuner."""
    modules: dict[str, nn.Module] = {}
    weights: dict[str, torch.Tensor] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        if module in seen:  # a module that has two names counts once, as in named_modules
            return
        seen.add(module)
        modules[name] = module
        prefix = f"{name}." if name else ""
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            weights[prefix + key] = tensor
        for key, child in module.named_children():
            visit(child, prefix + key)

    visit(model, "")
    return BaseView(modules, weights)


# ---- one stock LoRA adapter -------------------------------------------------------------------------------------


@torch.no_grad()
def export_lora(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one stock LoRA adapter that equals the sum of several tasks' adapters (Eq. 3).

    The ranks are concatenated, each adapter's scale is folded into its B, and modules of lower rank are padded with
    zeros: one rank, alpha = rank (a scale of 1), no patterns. The logits are those of the merged model.

    vLLM takes ranks up to 512, its `--max-lora-rank` (8, 16, 32, 64, 128, 256, 320 or 512) must be at least the rank,
    and it loads neither heads nor LoRA biases.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        folder: where to; made if it does not exist. An earlier export is replaced, file by file, the config last.
        tasks: which adapters to add up, each alone, without its history. None: the active task and its history.
        max_rank: modules of a higher rank get the best approximation of this rank (truncated SVD); the relative error
            is logged and written into the export's README.md.
        dtype: of the exported weights. None: the one that the adapters have (in half precision, folding the scales in
            may round; the error in the README.md counts that too).

    Returns:
        The folder.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, an adapter that is no sum (DoRA
            and others), a layer type that stock PEFT cannot load, a folder that holds a chain or a model.
        MissingHistoryError: the history of the active task is not loaded.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise ChainError("export_lora needs a PeftModel with ASO_LORA adapters.")
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 1):
        raise ChainError(f"max_rank={max_rank!r} must be a whole number of at least 1, or None for the exact sum.")
    path = Path(folder)
    _check_target(path, dtype, _LORA_TITLE)
    names = _selected(tuner, tasks)
    layers = _layers(tuner, names)
    if dtype is None:
        held = [m.dtype for layer in layers.values() for n in adapters_in(layer, names) for m in matrices_of(layer, n)]
        dtype = reduce(torch.promote_types, held)
    biases = _biases(layers, names)
    sums, written = {}, {}
    for name, layer in tqdm(layers.items(), desc="Exporting", unit="module", leave=False):
        sums[name] = _merged(tuner, layer, names)
        written[name] = _truncated(sums[name], max_rank) if max_rank else sums[name]
    rank = max(len(update.A) for update in written.values())
    weights: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        A, B = (factor.to("cpu", dtype) for factor in _padded(written[name], rank)[:2])
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ChainError(
                f"The weights of {name} hold NaN or Inf in {dtype}. Try dtype=torch.float32, or leave a task whose "
                "training diverged out with tasks=[...]."
            )
        written[name] = LowRank(A.to(sums[name].A), B.to(sums[name].B))  # as it will be read back
        first_A, first_B = matrices_of(layer, adapters_in(layer, names)[0])
        A, B = A.reshape(rank, *first_A.shape[1:]), B.reshape(first_B.shape[0], rank, *first_B.shape[2:])
        endings = ("embedding_A", "embedding_B") if isinstance(layer, Embedding) else ("A.weight", "B.weight")
        for ending, factor in zip(endings, (A, B), strict=True):
            weights[f"{PREFIX}{name}.lora_{ending}"] = factor.contiguous()
    error = _relative_error(sums, written)
    weights.update({f"{PREFIX}{name}.lora_B.bias": bias.to(dtype) for name, bias in biases.items()})
    weights.update({PREFIX + key: value for key, value in _head(tuner, names).items()})
    config = _config(tuner, names, layers, rank, lora_bias=bool(biases))
    full_rank = max(len(update.A) for update in sums.values())
    if rank < full_rank:
        logger.warning("export_lora: rank %d instead of %d: relative error %s", rank, full_rank, error)
    largest = next((each for each in VLLM_RANKS if each >= rank), None)
    if largest is None:
        warnings.warn(
            f"The export has rank {rank}; vLLM loads ranks up to {VLLM_RANKS[-1]}. For vLLM, give max_rank=512.",
            stacklevel=2,
        )
    base = config["base_model_name_or_path"]
    card = [
        "---",
        *([f"base_model: {base}"] if base and not os.path.exists(base) else []),
        "library_name: peft\ntags:\n- lora\n---\n",
        f"{_LORA_TITLE}\n",
        f"The sum of the adapters of these tasks, in the order in which they were learned: {_listed(tuner, names)}.\n",
        f"- rank {rank}, alpha {rank} (scale 1) in every module",
        f"- relative error against the sum, in the Frobenius norm: {error}",
        f"- modules saved with the adapter: {', '.join(config['modules_to_save'] or ['none'])}\n",
        f"PEFT: `PeftModel.from_pretrained(base_model, <this folder>)`, with {base or 'the base model'}.\n",
        f"vLLM: `--max-lora-rank {largest}`." if largest else "vLLM: the rank is above its largest, 512.",
    ]

    def write(stage: Path) -> None:
        save_file(weights, str(stage / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        (stage / README_NAME).write_text("\n".join(card) + "\n", encoding="utf-8")

    return _write(path, write, last=CONFIG_NAME, title=_LORA_TITLE)


def _merged(tuner: ASOLoraModel, layer: LoraLayer, names: Sequence[str]) -> LowRank:
    """The merged update of one layer in float64, with the scale 1."""
    updates = [low_rank(layer, name) for name in adapters_in(layer, names)]
    if updates[0].A.device.type == "mps":  # has no float64
        updates = [LowRank(A.cpu(), B.cpu(), scale) for A, B, scale in updates]
    merge = MERGES[tuner.peft_config[names[-1]].merge]
    A, B, scale = merge([LowRank(A.double(), B.double(), scale) for A, B, scale in updates])
    return LowRank(A, B * scale)


def _truncated(update: LowRank, rank: int) -> LowRank:
    """The best approximation of that rank in the Frobenius norm (Eckart-Young), by the SVD of a small core.

    With `B = Q_B R_B` and `A.T = Q_A R_A` the singular values of `B A` are those of `R_B R_A^T`. Each factor gets the
    square roots of the singular values.
    """
    if len(update.A) <= rank:
        return update
    (q_B, r_B), (q_A, r_A) = torch.linalg.qr(update.B), torch.linalg.qr(update.A.T)
    left, values, right = torch.linalg.svd(r_B @ r_A.T)
    roots = values[:rank].sqrt()
    return LowRank(roots.unsqueeze(1) * (right[: len(roots)] @ q_A.T), q_B @ left[:, : len(roots)] * roots)


def _padded(update: LowRank, rank: int) -> LowRank:
    """The same matrix with factors of that rank."""
    more = rank - len(update.A)
    return LowRank(nn.functional.pad(update.A, (0, 0, 0, more)), nn.functional.pad(update.B, (0, more)))


def _norm(update: LowRank) -> float:
    """The Frobenius norm of `B A`."""
    r_B, r_A = torch.linalg.qr(update.B).R, torch.linalg.qr(update.A.T).R
    return float(torch.linalg.matrix_norm(r_B @ r_A.T))


def _relative_error(sums: Mapping[str, LowRank], written: Mapping[str, LowRank]) -> str:
    """||written - sum|| / ||sum|| in the Frobenius norm, in words: over all modules, and of the worst one."""
    errors, norms = {}, {}
    for name, exact in sums.items():
        A, B, _ = written[name]
        errors[name] = _norm(LowRank(torch.cat([A, exact.A]), torch.cat([B, -exact.B], dim=1)))
        norms[name] = _norm(exact)
    relative = {name: error / norms[name] if norms[name] else 0.0 for name, error in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    total = math.hypot(*errors.values()) / (math.hypot(*norms.values()) or 1.0)
    return f"{total:.2e} over all weights, {relative[worst]:.2e} at worst ({worst})"


def _config(
    tuner: ASOLoraModel, names: Sequence[str], layers: Mapping[str, LoraLayer], rank: int, lora_bias: bool
) -> dict[str, Any]:
    """adapter_config.json of a stock LoRA adapter: one rank, a scale of 1, no patterns."""
    last = tuner.peft_config[names[-1]]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_bias=lora_bias,
        fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        modules_to_save=list(dict.fromkeys(last.modules_to_save)) if last.modules_to_save else None,
        task_type=last.task_type,
        base_model_name_or_path=last.base_model_name_or_path or tuner.model.__dict__.get("name_or_path") or None,
        revision=last.revision,
        inference_mode=True,
    )
    targets = exact_targets(layers, list(base_view(tuner.model).modules), config)
    values: dict[str, Any] = {**config.to_dict(), "target_modules": targets}
    if last.task_type is None:  # what PEFT writes for its AutoPeftModel
        base = type(tuner.model)
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return values


def exact_targets(wanted: Mapping[str, Any] | Sequence[str], modules: Sequence[str], config: Any) -> list[str] | str:
    """`target_modules` of a `LoraConfig` that match just the wanted ones of all modules: endings or full names.

    Raises:
        ChainError: stock PEFT would leave a module out whatever the names (it lies in one of modules_to_save).
    """
    names = sorted(wanted)
    endings = [sorted({".".join(name.split(".")[-parts:]) for name in names}) for parts in (1, 2, 3)]
    candidates: list[list[str] | str] = [*endings, names, "|".join(map(re.escape, names))]
    for candidate in candidates:
        config.target_modules = candidate if isinstance(candidate, str) else set(candidate)
        if {name for name in modules if name and check_target_module_exists(config, name)} == set(names):
            return candidate
    lost = next((name for name in names if not check_target_module_exists(config, name)), names[0])
    raise ChainError(
        f"Stock PEFT puts no LoRA adapter on {lost}, which is in one of modules_to_save={config.modules_to_save}. "
        "Export tasks that do not mix the two."
    )


# ---- one merged model -------------------------------------------------------------------------------------------


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
    """Write base weights plus the sum of several tasks' adapters as a transformers model folder (Eq. 3).

    Each weight is added up in float32 (the adapters' products in float64) and rounded once, to `dtype`. The model
    itself is not touched. `AutoModel...from_pretrained(folder)`, vLLM and llama.cpp's converter read the folder.

    Args:
        model: a `PeftModel` with ASO_LORA adapters on a transformers model.
        folder: where to; made if it does not exist. An earlier export is replaced, file by file, the config last.
        tasks: which adapters to add up, each alone, without its history. None: the active task and its history.
        dtype: of the weights that are written. None: the one that each has in the base model.
        max_shard_size: as in `save_pretrained`.
        tokenizer: saved too, if given.

    Returns:
        The folder.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, an adapter that is no sum, a
            base that is quantized or merged already, a folder that holds a chain, an adapter or another model.
        MissingHistoryError: the history of the active task is not loaded.
    """
    tuner = tuner_of(model)
    if tuner is None or not hasattr(tuner.model, "save_pretrained"):
        raise ChainError("export_merged needs a PeftModel with ASO_LORA adapters on a transformers model.")
    path = Path(folder)
    _check_target(path, dtype, _MODEL_TITLE)
    names = _selected(tuner, tasks)
    merged = _model_with(tuner.model, _merged_weights(tuner, names, dtype))
    base = tuner.peft_config[names[-1]].base_model_name_or_path
    card = (
        f"{_MODEL_TITLE}\n\n{base or 'The base model'} plus the sum of the LoRA adapters of these tasks, in the order "
        f"in which they were learned: {_listed(tuner, names)}. Each weight was added up in float32, rounded once.\n"
    )

    def write(stage: Path) -> None:
        merged.save_pretrained(stage, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        (stage / README_NAME).write_text(card, encoding="utf-8")

    return _write(path, write, last=MODEL_CONFIG_NAME, title=_MODEL_TITLE)


def _merged_weights(tuner: ASOLoraModel, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """All weights of the merged model, by the names of the base model."""
    view, layers = base_view(tuner.model), _layers(tuner, names)
    found = {name: tensor.detach() for name, tensor in view.weights.items()}
    for name, module in view.modules.items():
        for key in module._non_persistent_buffers_set:
            del found[f"{name}.{key}" if name else key]
    found.update(_head(tuner, names))
    biases = _biases(layers, names)
    for name, layer in tqdm(layers.items(), desc="Merging", unit="module", leave=False):
        base: Any = layer.get_base_layer()
        if layer.merged:
            raise ChainError(f"Adapters are merged into {name} already. Call model.unmerge_adapter() first.")
        is_known = isinstance(base, _MERGED) and type(base.weight.data) is torch.Tensor
        if not is_known or not base.weight.is_floating_point():
            raise ChainError(
                f"{name} is a {type(base).__name__} with a weight of type {type(base.weight).__name__}, which cannot "
                "be merged. Load the base model in half precision, put the chain on it, and export that."
            )
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
    broken = [name for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ChainError(
            f"{broken[0]} holds NaN or Inf after merging. Try dtype=torch.float32, or leave a task whose training "
            "diverged out with tasks=[...]."
        )
    return found


def _model_with(base: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model of the base's class with these weights, which are not copied."""
    config = copy.deepcopy(base.config)
    tied: dict[int, list[torch.Tensor]] = {}
    for name, tensor in base_view(base).weights.items():
        if name in weights:
            tied.setdefault(id(tensor), []).append(weights[name])
    if any(not torch.equal(group[0], other) for group in tied.values() for other in group[1:]):
        config.tie_word_embeddings = False  # one of the two had an adapter
    with torch.device("meta"):
        model = type(base)(config)
    missing, unexpected = model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left or unexpected:
        raise ChainError(
            f"The merged weights do not fit a new {type(base).__name__}: {left[:3]} missing, {unexpected[:3]} too "
            "many. Use model.merge_and_unload() and save_pretrained."
        )
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.config.dtype = dtypes.pop()
    model.generation_config = getattr(base, "generation_config", None)
    return model


# ---- both -------------------------------------------------------------------------------------------------------


def _check_target(folder: Path, dtype: torch.dtype | None, title: str) -> None:
    """Refuse a folder from which a chain, an adapter or a model is read that is no earlier export of this kind."""
    if dtype is not None and not dtype.is_floating_point:
        raise ChainError(f"dtype={dtype} is not a floating point type. Use torch.float32, bfloat16 or float16.")
    others = [name for name in (MANIFEST_NAME, CONFIG_NAME, MODEL_CONFIG_NAME) if (folder / name).exists()]
    if others and (MANIFEST_NAME in others or title not in _readme(folder)):
        raise ChainError(f"{folder} holds a chain, an adapter or a model ({others[0]}). Give another folder.")


def _readme(folder: Path) -> str:
    path = folder / README_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write(folder: Path, write: Callable[[Path], None], last: str, title: str) -> Path:
    """Write into a temporary folder and move file by file, `last` at the end; files of an earlier export go.

    A README.md of somebody else's stays.
    """
    with staging(folder) as stage:
        write(stage)
        flush(stage)
        is_own = title in _readme(folder)
        if (folder / README_NAME).exists() and not is_own:
            (stage / README_NAME).unlink()
        new = sorted(os.listdir(stage), key=lambda name: name == last)
        for name in new:
            os.replace(stage / name, folder / name)
        for stale in folder.glob("model*.safetensors*"):  # shards, of which the new export may have fewer
            if is_own and stale.name not in new:
                stale.unlink()
    flush(folder, deep=False)
    return folder


def _listed(tuner: ASOLoraModel, names: Sequence[str]) -> str:
    return ", ".join(task_name_of(name, tuner.peft_config[name]) for name in names)


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
        reasons = list(chain_obstacles(configs[name]))
        if configs[name].use_qalora:
            reasons.append("use_qalora: it pools the layer's input")
        if reasons:
            raise ChainError(
                f"The adapter {name!r} cannot be part of the sum: {reasons[0]}. Leave it out with tasks=[...], or "
                "save it as it is with save_chain."
            )
    return names


def _layers(tuner: ASOLoraModel, names: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers on which one of the adapters has weights."""
    layers = tuner.lora_layers(names)
    for name, layer in layers.items():
        if isinstance(layer, UNSUPPORTED_LAYERS) or getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ChainError(
                f"{name} is a {type(layer).__name__} layer or has groups, so its adapters cannot be added up. Leave "
                "its tasks out with tasks=[...]."
            )
    return layers


def _biases(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Module -> the sum of its scaled LoRA biases (zeros if only others have some); empty if none has."""
    biases: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        present = [task for task in adapters_in(layer, names) if layer.lora_bias.get(task, False)]
        terms = [layer.lora_B[task].bias.detach().double().cpu() * layer.scaling[task] for task in present]
        if terms:
            biases[name] = torch.stack(terms).sum(0)
    if not biases:
        return {}
    embedding = next((name for name, layer in layers.items() if isinstance(layer, Embedding)), None)
    if embedding is not None:
        raise ChainError(
            f"Some adapters have lora_bias and {embedding} is an embedding, and stock PEFT cannot load both in one "
            "adapter. Leave one of the tasks out with tasks=[...]."
        )
    return {name: biases.get(name, torch.zeros(layer.out_features)) for name, layer in layers.items()}


def _head(tuner: ASOLoraModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights of the last task's modules_to_save, by the base model's names; others cannot be summed."""
    others = [name for name in names[:-1] if tuner.peft_config[name].modules_to_save]
    if others:
        warnings.warn(
            f"modules_to_save of {others} are left out of the export: task heads are not summed, it has those of "
            f"{names[-1]!r}.",
            stacklevel=4,
        )
    return {
        f"{name}.{key}": value.detach().cpu().clone().contiguous()
        for name, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and names[-1] in module.modules_to_save
        for key, value in module.modules_to_save[names[-1]].state_dict().items()
    }
