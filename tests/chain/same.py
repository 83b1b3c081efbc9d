"""Whether two models with adapters are the same, to the last attribute."""

from __future__ import annotations

from typing import Any

import torch


def attributes(model: Any) -> dict[str, Any]:
    """All that can be told of a model but for the values of its tensors."""
    tuner = model.base_model
    names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")
    names += (
        "frozen_peft_weight_names",
        "declared_frozen",
        "active_adapters",
        "disable_adapters",
        "merged_adapters",
        "fan_in_fan_out",
    )
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [
            (name, type(value), value.dtype, value.device, value.shape, value.stride(), value.requires_grad)
            for name, value in model.named_parameters()
        ],
        "layers": {
            key: {name: getattr(layer, name, None) for name in names} | {"own": sorted(vars(layer))}
            for key, layer in tuner.lora_layers().items()
        },
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
        "tasks": [tuner.tasks.histories, tuner.tasks.missing, tuner.tasks.frozen, tuner.tasks.isolated],
        "active": [model.active_adapters, model.active_adapter, tuner.active_adapters],
        "targets": tuner.targeted_module_names,
        "left over": [tuner._without_weights, tuner._unprojected],
        "vectors": {name: vector.tolist() for name, vector in tuner.attribution.items()},
    }


def check_same(model: Any, expected: Any) -> None:
    """Two models with the same base are equal in everything."""
    found, wanted = attributes(model), attributes(expected)
    for part in wanted:
        assert found[part] == wanted[part], part
    values, wanted_values = model.state_dict(), expected.state_dict()
    assert list(values) == list(wanted_values)
    assert all(torch.equal(values[name], wanted_values[name]) for name in values)
