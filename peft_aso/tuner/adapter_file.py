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

    The dtype in which they are stored is left out (PEFT changes it when it loads), and so is the attribution vector.

    Args:
        weights: key in the adapter's file -> tensor.
        config: the adapter's, whose scale is hashed too. None: the values alone (`chain.json` of format version 1).
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name == ATTRIBUTION_KEY:
            continue
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    if config is not None:
        scale = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}
        digest.update(json.dumps(scale, sort_keys=True).encode())
    return digest.hexdigest()


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
