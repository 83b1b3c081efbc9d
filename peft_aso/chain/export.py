"""Export tasks as one stock LoRA adapter, which PEFT and vLLM load without this package."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from ..tuner import ASOLoraModel
from ..tuner.history import adapter_of, chain_obstacles, task_name_of
from ..tuner.layer import UNSUPPORTED_LAYERS, adapters_in, matrices_of
from ..tuner.persistence import tuner_of
from .atomic import replaced_folder
from .errors import ChainError
from .fitting import PREFIX, BaseView
from .lowrank import Product, distance, norm, padded, truncated, weighted_sum
from .manifest import MANIFEST_NAME
from .reading import STOCK_TYPE_NAME, read_json_config
from .targets import exact_targets

logger = logging.getLogger(__name__)

README_NAME = "README.md"
_TITLE = "# One LoRA adapter for several tasks"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
VLLM_LARGEST_RANK = VLLM_RANKS[-1]


def export_lora(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one stock LoRA adapter that equals the sum of several tasks' adapters (the sum of Eq. 3).

    The ranks are concatenated, each adapter's scale is folded into its B, modules of lower rank are padded
    with zeros: the result has one rank, alpha = rank (a scale of 1) and no patterns. It has the same logits
    as the merged model. The folder takes its place in one step: if anything fails, what was there stays.

    vLLM takes ranks up to 512, and its `--max-lora-rank` (one of 8, 16, 32, 64, 128, 256, 320, 512) must be
    at least the rank; it loads neither heads nor LoRA biases.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        folder: where to; made if it does not exist.
        tasks: which adapters to add up, each alone, without its history. None: the active task and its
            history.
        max_rank: largest rank. Modules of a higher one get the best approximation of this rank (truncated
            SVD); the relative error is logged and written into the README.md of the export (a README.md of
            somebody else's stays as it is).
        dtype: of the exported weights. None: the one that the adapters have (in half precision, folding the
            scales in may round; the error in the README.md counts that too).

    Returns:
        The folder.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, an adapter that is no
            sum (DoRA and others), a layer type that stock PEFT cannot load, a folder that holds a chain or a model.
        MissingHistoryError: the history of the active task is not loaded.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise ChainError("export_lora needs a PeftModel with ASO_LORA adapters.")
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 1):
        raise ChainError(f"max_rank={max_rank!r} must be a whole number of at least 1, or None for the exact sum.")
    if dtype is not None and not dtype.is_floating_point:
        raise ChainError(f"dtype={dtype} is not a floating point type. Use torch.float32, bfloat16 or float16.")
    _check_folder(Path(folder))
    names = selected_adapters(tuner, tasks)
    layers = layers_of(tuner, names)
    biases = biases_of(layers, names)
    dtype = dtype or _common_dtype(layers, names)
    sums = {name: weighted_sum(parts_of(layer, names)) for name, layer in layers.items()}
    short = {name: truncated(product, max_rank or product.rank) for name, product in sums.items()}
    rank = max(product.rank for product in short.values())
    written = {name: _rounded(name, padded(product, rank), dtype) for name, product in short.items()}
    error = _relative_error(sums, written)
    weights = _weights(layers, names, written, dtype)
    weights.update({f"{PREFIX}{name}.lora_B.bias": bias.to(dtype) for name, bias in biases.items()})
    weights.update(head_of(tuner, names))
    config = _config(tuner, names, layers, rank, lora_bias=bool(biases))
    _say(rank, max(product.rank for product in sums.values()), error)
    with replaced_folder(folder) as stage:
        save_file(weights, str(stage / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if _is_own(Path(folder) / README_NAME):
            (stage / README_NAME).write_text(_readme(tuner, names, config, error), encoding="utf-8")
    return Path(folder)


def _check_folder(folder: Path) -> None:
    """A folder that a chain or a model is read from must not get an adapter of its own."""
    if (folder / MODEL_CONFIG_NAME).exists():
        raise ChainError(
            f"{folder} holds a model ({MODEL_CONFIG_NAME}), which would be loaded with the export on top "
            "afterwards. Give another folder."
        )
    holds_chain = (folder / MANIFEST_NAME).exists()
    if (folder / CONFIG_NAME).is_file():
        kind = read_json_config(folder / CONFIG_NAME).get("peft_type")
        holds_chain = holds_chain or kind != STOCK_TYPE_NAME
    if holds_chain:
        raise ChainError(
            f"{folder} holds a chain of tasks or another adapter, which the export would be mixed up with. "
            "Give another folder."
        )


def _is_own(readme: Path) -> bool:
    """Whether the README.md of an export may be written here: none lies there, or that of an earlier export."""
    return not readme.exists() or _TITLE in readme.read_text(encoding="utf-8", errors="replace")


def selected_adapters(tuner: ASOLoraModel, tasks: Sequence[str] | None) -> list[str]:
    """The adapters to add up, oldest first; the last one's head is the export's."""
    configs = tuner.peft_config
    if tasks is None:
        tuner.tasks.require([tuner.current_task])
        names = tuner.tasks.expand([tuner.current_task])
    else:
        wanted = [tasks] if isinstance(tasks, str) else list(tasks)
        found = [adapter_of(task, configs) for task in wanted]
        if not found or None in found or len(set(found)) < len(found):
            known = ", ".join(repr(task_name_of(name, config)) for name, config in configs.items())
            raise ChainError(f"tasks={wanted}: give each task once, out of those that the model holds: {known}.")
        names = [name for name in found if name is not None]
    for name in names:
        reasons = list(chain_obstacles(configs[name]))
        if configs[name].use_qalora:
            reasons.append("use_qalora: it pools the layer's input")
        if reasons:
            raise ChainError(
                f"The adapter {name!r} cannot be part of a stock LoRA adapter: {reasons[0]}. Leave it out "
                "with tasks=[...], or save it as it is with save_chain."
            )
    return names


def layers_of(tuner: ASOLoraModel, names: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers on which one of the adapters has weights."""
    layers = tuner.lora_layers(names)
    for name, layer in layers.items():
        groups = getattr(layer.get_base_layer(), "groups", 1)
        if isinstance(layer, UNSUPPORTED_LAYERS) or groups > 1:
            kind = f"a convolution with {groups} groups" if groups > 1 else f"a {type(layer).__name__} layer"
            raise ChainError(
                f"{name} is {kind}, whose adapters cannot be added up into one. Leave its tasks out with "
                "tasks=[...], or train without it in target_modules."
            )
    return layers


def parts_of(layer: LoraLayer, names: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """A, B (convolutions flattened) and scale of each adapter that the layer has."""
    present = adapters_in(layer, names)
    pairs = [matrices_of(layer, name) for name in present]
    return [(a.flatten(1), b.flatten(1), float(layer.scaling[n])) for n, (a, b) in zip(present, pairs, strict=True)]


def _common_dtype(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> torch.dtype:
    """The smallest dtype that holds all adapters' values."""
    dtypes = [
        matrix.dtype
        for layer in layers.values()
        for name in adapters_in(layer, names)
        for matrix in matrices_of(layer, name)
    ]
    return reduce(torch.promote_types, dtypes)


def _rounded(name: str, product: Product, dtype: torch.dtype) -> Product:
    """The product as it will be read back after saving in `dtype`."""
    rounded = Product(product.down.to(dtype).double(), product.up.to(dtype).double())
    if not all(torch.isfinite(factor).all() for factor in rounded):
        raise ChainError(
            f"The weights of {name} hold NaN or Inf in {dtype}: a training diverged, or the values are too "
            "large for that type. Nothing was written. Try dtype=torch.float32, or leave the task out with "
            "tasks=[...]."
        )
    return rounded


def _relative_error(sums: Mapping[str, Product], written: Mapping[str, Product]) -> dict[str, float]:
    """||exported - sum|| / ||sum|| in the Frobenius norm: over all modules (key "") and of each."""
    errors = {name: distance(written[name], product) for name, product in sums.items()}
    norms = {name: norm(product) for name, product in sums.items()}
    total = math.hypot(*norms.values())
    relative = {"": math.hypot(*errors.values()) / total if total else 0.0}
    relative.update({name: error / norms[name] if norms[name] else 0.0 for name, error in errors.items()})
    return relative


def _weights(
    layers: Mapping[str, LoraLayer], names: Sequence[str], written: Mapping[str, Product], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of the file, under the names that PEFT gives them."""
    weights: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        down, up = matrices_of(layer, adapters_in(layer, names)[0])
        endings = ("lora_A.weight", "lora_B.weight")
        if isinstance(layer, Embedding):
            endings = ("lora_embedding_A", "lora_embedding_B")
        factors = (
            written[name].down.reshape(-1, *down.shape[1:]),
            written[name].up.reshape(up.shape[0], -1, *up.shape[2:]),
        )
        for ending, factor in zip(endings, factors, strict=True):
            weights[f"{PREFIX}{name}.{ending}"] = factor.to(device="cpu", dtype=dtype).contiguous()
    return weights


def biases_of(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Module -> the sum of its scaled LoRA biases (zeros if only others have some); empty if none has."""
    biases: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        present = [task for task in adapters_in(layer, names) if layer.lora_bias.get(task, False)]
        terms = [layer.lora_B[task].bias.detach().double() * layer.scaling[task] for task in present]
        if terms:
            biases[name] = torch.stack(terms).sum(0).cpu()
    if not biases:
        return {}
    embedding = next((name for name, layer in layers.items() if isinstance(layer, Embedding)), None)
    if embedding is not None:
        raise ChainError(
            f"Some adapters have lora_bias and {embedding} is an embedding; stock PEFT cannot load both in "
            "one adapter. Leave one of the tasks out with tasks=[...]."
        )
    return {name: biases.get(name, torch.zeros(layer.out_features)) for name, layer in layers.items()}


def head_of(tuner: ASOLoraModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights of the last task's modules_to_save; others cannot be summed and are left out."""
    left_out = [name for name in names[:-1] if tuner.peft_config[name].modules_to_save]
    if left_out:
        warnings.warn(
            f"modules_to_save of {left_out} are left out of the export: task heads are not summed, it has "
            f"those of {names[-1]!r}.",
            stacklevel=3,
        )
    weights: dict[str, torch.Tensor] = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and names[-1] in module.modules_to_save:
            for key, value in module.modules_to_save[names[-1]].state_dict().items():
                weights[f"{PREFIX}{name}.{key}"] = value.detach().cpu().clone().contiguous()
    return weights


def _config(
    tuner: ASOLoraModel, names: Sequence[str], layers: Mapping[str, LoraLayer], rank: int, lora_bias: bool
) -> dict[str, Any]:
    """adapter_config.json of a stock LoRA adapter: one rank, a scale of 1, no patterns."""
    last = tuner.peft_config[names[-1]]
    heads = list(dict.fromkeys(last.modules_to_save)) if last.modules_to_save else None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        lora_bias=lora_bias,
        fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        modules_to_save=heads,
        task_type=last.task_type,
        base_model_name_or_path=last.base_model_name_or_path or tuner.model.__dict__.get("name_or_path") or None,
        revision=last.revision,
        inference_mode=True,
    )
    targets = exact_targets(layers, list(BaseView.of(tuner.model).modules), config)
    values = config.to_dict()
    values["target_modules"] = targets
    if last.task_type is None:  # what PEFT writes for its AutoPeftModel
        base = type(tuner.model)
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return values


def _say(rank: int, full_rank: int, error: Mapping[str, float]) -> None:
    if rank < full_rank:
        worst = max((name for name in error if name), key=lambda name: error[name])
        logger.warning(
            "export_lora: rank %d instead of %d: relative error %.2e over all weights, %.2e at worst (%s)",
            rank,
            full_rank,
            error[""],
            error[worst],
            worst,
        )
    if rank > VLLM_LARGEST_RANK:
        warnings.warn(
            f"The exported adapter has rank {rank}; vLLM loads ranks up to {VLLM_LARGEST_RANK}. For vLLM, "
            f"export with max_rank={VLLM_LARGEST_RANK} or less. Stock PEFT loads any.",
            stacklevel=3,
        )


def _readme(tuner: ASOLoraModel, names: Sequence[str], config: Mapping[str, Any], error: Mapping[str, float]) -> str:
    """What the export is, how exact, and how to load it."""
    base = config["base_model_name_or_path"]
    on_hub = base and not os.path.exists(base)
    head = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "---",
        "",
    ]
    tasks = ", ".join(task_name_of(name, tuner.peft_config[name]) for name in names)
    worst = max((name for name in error if name), key=lambda name: error[name])
    largest = next((rank for rank in VLLM_RANKS if rank >= config["r"]), None)
    lines = [
        _TITLE,
        "",
        f"The sum of the adapters of these tasks, in the order in which they were learned: {tasks}.",
        "",
        f"- rank {config['r']}, alpha {config['lora_alpha']} (scale 1) in every module",
        f"- relative error against the sum, in the Frobenius norm: {error['']:.2e} over all weights, "
        f"{error[worst]:.2e} at worst ({worst})",
        f"- modules saved as a whole: {', '.join(config['modules_to_save'] or ['none'])}",
        "",
        f"PEFT: `PeftModel.from_pretrained(base_model, <this folder>)`, base model {base or 'as it was trained on'}.",
        "",
        f"vLLM: `--max-lora-rank {largest}`." if largest else "vLLM: the rank is above its largest, 512.",
        "",
    ]
    return "\n".join([*head, *lines])
