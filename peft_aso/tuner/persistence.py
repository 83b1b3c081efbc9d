"""The attribution vector's way into an adapter's file and out of it.

It is stored beside the adapter's weights under one key; its layout (which neurons stand where) is in the config,
because the metadata of PEFT's safetensors files is fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .model import ASOLoraModel

ATTRIBUTION_KEY = "aso_attribution_vector"


def tuner_of(model: nn.Module) -> ASOLoraModel | None:
    """The `ASOLoraModel` in a PEFT model, which may be wrapped by torch.compile or a data-parallel module."""
    from .model import ASOLoraModel

    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    tuner = getattr(model, "base_model", model)
    return tuner if isinstance(tuner, ASOLoraModel) else None


def with_attribution(
    state_dict: dict[str, Any], tuner: ASOLoraModel | None, adapter_name: str
) -> dict[str, Any]:
    """The adapter's state dict with its attribution vector, if it has one."""
    vector = tuner.attribution.get(adapter_name) if tuner is not None else None
    return state_dict if vector is None else {**state_dict, ATTRIBUTION_KEY: vector.detach().cpu()}


def take_attribution(
    tuner: ASOLoraModel | None, adapter_name: str, config: Any, vector: torch.Tensor | None
) -> None:
    """Keep a loaded attribution vector, after checking it against the layout in the adapter's config.

    Raises:
        ValueError: the vector is not finite, or has another length than its layout says.
    """
    if tuner is None or vector is None:
        return
    layout = config.attribution_layout
    expected = layout[-1][2] if layout else None
    if vector.dim() != 1 or vector.numel() != expected:
        raise ValueError(
            f"The attribution vector of adapter {adapter_name!r} has shape {tuple(vector.shape)}, but its config "
            f"describes {expected} neurons: adapter_config.json and the weights do not belong together."
        )
    if not torch.isfinite(vector).all():
        raise ValueError(f"The attribution vector of adapter {adapter_name!r} holds NaN or Inf; the file is damaged.")
    tuner.attribution[adapter_name] = vector.float()
