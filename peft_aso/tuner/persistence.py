"""The attribution vector's way into an adapter's file and out of it.

It is stored beside the adapter's weights under one key; its layout (which neurons stand where) is in the
config, because the metadata of PEFT's safetensors files is fixed.
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

    if isinstance(model, ASOLoraModel):
        return model
    children = dict(model.named_children())
    inside = (children[name] for name in ("_orig_mod", "module", "base_model") if name in children)
    return next((tuner for tuner in map(tuner_of, inside) if tuner is not None), None)


def with_attribution(state_dict: dict[str, Any], tuner: ASOLoraModel | None, adapter_name: str) -> dict[str, Any]:
    """The adapter's state dict with its attribution vector, if it has one."""
    vector = tuner.attribution.get(adapter_name) if tuner is not None else None
    return state_dict if vector is None else {**state_dict, ATTRIBUTION_KEY: vector.detach().cpu()}


def check_attribution(adapter_name: str, layout: Any, vector: torch.Tensor) -> None:
    """Check a loaded attribution vector against the layout in its adapter's config.

    Args:
        layout: `[module, start, stop]` of each layer.
        vector: `(N,)`.

    Raises:
        ValueError: the vector is not finite, or has another length than its layout says.
    """
    expected = 0
    for entry in layout or []:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3 or entry[1] != expected or entry[2] < entry[1]:
            raise ValueError(
                f"attribution_layout in the config of adapter {adapter_name!r} is damaged at {entry!r}: the "
                "layers' [module, start, stop] must follow on each other. Take the adapter_config.json that "
                "was saved with the weights."
            )
        expected = entry[2]
    if vector.dim() != 1 or vector.numel() != expected:
        raise ValueError(
            f"The attribution vector of adapter {adapter_name!r} has shape {tuple(vector.shape)}, but its "
            f"config describes {expected} neurons: adapter_config.json and the weights do not belong "
            "together."
        )
    if not torch.isfinite(vector).all():
        raise ValueError(
            f"The attribution vector of adapter {adapter_name!r} holds NaN or Inf; the file is damaged. Use "
            "an earlier checkpoint."
        )
