"""What an adapter's file holds: its tensors and their names, their hash, and what is checked before they are
loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

ATTRIBUTION_KEY = "aso_attribution_vector"  # its layout is in the config
INPUTS_KEY = "aso_inputs."  # input directions: followed by the modules that have this input, with commas between them


def is_own_key(key: str) -> bool:
    """Whether a tensor of an adapter's file is what this package stores with a task, and no weight."""
    return key == ATTRIBUTION_KEY or key.startswith(INPUTS_KEY)


def tensors_of(layers: Mapping[str, LoraLayer], name: str) -> dict[str, torch.Tensor]:
    """All LoRA tensors of one adapter under the names that they have in its file."""
    found = {}
    for module, layer in layers.items():
        for part in layer.adapter_layer_names:
            container = getattr(layer, part)
            if name in container:
                held = container[name]
                named = {"": held} if isinstance(held, torch.Tensor) else held.state_dict(prefix=".")
                if part == "lora_magnitude_vector":
                    named = {key.removesuffix(".weight"): value for key, value in named.items()}
                found.update({f"base_model.model.{module}.{part}{key}": value for key, value in named.items()})
    return found


def weights_hash(weights: Mapping[str, torch.Tensor], config: Any = None) -> str:
    """SHA-256 of an adapter's values as float32, in the order of the tensors' names, and of its scale.

    The dtype in which they are stored is left out (PEFT changes it when it loads), and so are the attribution vector
    and the input directions.

    Args:
        weights: key in the adapter's file -> tensor.
        config: the adapter's, whose scale is hashed too. None: the values alone (`chain.json` of format version 1).
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if is_own_key(name):
            continue
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    if config is not None:
        scale = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}
        digest.update(json.dumps(scale, sort_keys=True).encode())
    return digest.hexdigest()


def stored_inputs(layers: Mapping[str, LoraLayer], name: str) -> dict[str, torch.Tensor]:
    """The input directions of one adapter under their keys in its file; modules with the same input share a tensor."""
    holders: dict[int, list[str]] = {}
    for module, layer in layers.items():
        if name in layer.task_inputs:
            holders.setdefault(id(layer.task_inputs[name]), []).append(module)
    return {INPUTS_KEY + ",".join(modules): layers[modules[0]].task_inputs[name] for modules in holders.values()}


def store_inputs(layers: Mapping[str, LoraLayer], name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the input directions of an adapter's file into its layers; others of the same name go.

    Raises:
        ValueError: they are of a module that the adapter does not have, not of the shape `(k, in)`, or not finite.
    """
    found = {}
    for key in filter(lambda key: key.startswith(INPUTS_KEY), tensors):
        tensor = tensors[key].detach().to("cpu", torch.float16)
        for module in key.removeprefix(INPUTS_KEY).split(","):
            weight = layers[module].lora_A[name].weight if module in layers and name in layers[module].lora_A else None
            width = -1 if weight is None else weight[0].numel()
            if tensor.dim() != 2 or tensor.shape[1] != width or not is_finite(tensor):
                raise ValueError(
                    f"The input directions {key!r} of adapter {name!r}, of shape {tuple(tensor.shape)}, do not fit "
                    "the module, or hold NaN or Inf. The file is damaged or was made for another base model."
                )
            found[module] = tensor
    for module, layer in layers.items():
        layer.task_inputs.pop(name, None)
        if module in found:
            layer.task_inputs[name] = found[module]


def is_finite(tensor: torch.Tensor) -> bool:
    """True if a tensor of any shape and dtype holds neither NaN nor Inf."""
    if not tensor.is_floating_point():
        return True
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no arithmetic
    # NaN and Inf stay in every sum: one pass without a copy. A sum of finite values can overflow, hence the second
    # look
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


_MISFIT = (
    "The adapter {!r} does not fit this model: {}. It was made for another base model, or its adapter_config.json "
    "does not belong to its weights."
)


def check_tensors(
    state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size], adapter: str, complete: bool = False
) -> None:
    """Raise ValueError unless weights that are about to be loaded have the names and shapes that the model has.

    Args:
        state_dict, shapes: with the model's own keys (the adapter's name in them).
        complete: whether all A and B of the adapter have to be there.
    """
    parts = [f".lora_{part}" for part in ("A", "B", "embedding_A", "embedding_B")]
    for key, value in state_dict.items():
        found = shapes.get(key)
        unknown = found is None and any(f"{part}." in f"{key}." for part in parts)
        if isinstance(value, torch.Tensor) and (unknown or (found is not None and found != value.shape)):
            here = "is not in it" if found is None else f"has shape {tuple(found)} in it"
            raise ValueError(_MISFIT.format(adapter, f"{key}, of shape {tuple(value.shape)} in the file, {here}"))
    expected = [key for part in parts for key in shapes if f"{part}.{adapter}." in f"{key}."]
    missing = [key for key in expected if key not in state_dict]
    if complete and missing:
        lacking = f"its file has no weights for {len(missing)} of the model's parameters, such as {missing[0]}"
        raise ValueError(_MISFIT.format(adapter, lacking))


def check_attribution(adapter_name: str, layout: Any, vector: torch.Tensor) -> None:
    """Raise ValueError unless a loaded attribution vector `(N,)` is finite and as long as its config's layout."""
    expected = 0
    for entry in layout or []:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3 or entry[1] != expected or entry[2] < entry[1]:
            raise ValueError(
                f"attribution_layout in the config of adapter {adapter_name!r} is damaged at {entry!r}: the layers' "
                "[module, start, stop] must be contiguous. Take the adapter_config.json that was saved with the "
                "weights."
            )
        expected = entry[2]
    if vector.dim() != 1 or vector.numel() != expected or not torch.isfinite(vector).all():
        raise ValueError(
            f"The attribution vector of adapter {adapter_name!r} has shape {tuple(vector.shape)} (or NaN or Inf in "
            f"it), and its config describes {expected} neurons. The file is damaged, or adapter_config.json belongs "
            "to other weights."
        )
