"""Many saved adapters added at once: `add_loaded_adapters`, which `load_chain` calls."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from tqdm.auto import tqdm

from .adapter_file import ATTRIBUTION_KEY, check_attribution, check_tensors, store_inputs, tensors_of
from .history import resolve_history
from .model import ASOLoraModel


def add_loaded_adapters(
    tuner: ASOLoraModel,
    adapters: Mapping[str, tuple[Any, Mapping[str, torch.Tensor]]],
    autocast_adapter_dtype: bool = True,
) -> None:
    """Add saved adapters with their weights, frozen. What is active and what trains does not change.

    PEFT's `add_adapter` walks the whole model several times for each adapter, so that loading T of them takes a
    time that grows with T^2. Here each layer gets its adapters on the meta device, then their tensors, and what
    concerns the whole model is done once.

    Args:
        adapters: name -> its config and its tensors (file key -> tensor), oldest first. Only adapters that are
            nothing but `lora_A` and `lora_B` of linear or convolution layers named in `target_modules`.
        autocast_adapter_dtype: as in PEFT: float32 weights where the base layer is in half precision.

    Raises:
        ValueError: a history that cannot be, tensors that do not fit the model and the config, a damaged
            attribution vector. The model is as before then, as after any other error.
    """
    trained = [parameter for parameter in tuner.model.parameters() if parameter.requires_grad]
    prefix, layers_of = "base_model.model.", {}
    try:
        names = [name for name, _ in tuner.model.named_modules() if ".lora_" not in name and ".base_layer" not in name]
        for name, (config, _) in adapters.items():
            tuner.peft_config[name] = copy.deepcopy(config)
            resolve_history(name, tuner.peft_config)
        bar = tqdm(adapters.items(), desc="Loading tasks", leave=False, disable=len(adapters) < 5)
        for name, (config, tensors) in bar:
            empty = copy.copy(config)
            empty.init_lora_weights, empty.inference_mode = False, True
            layers: dict[str, LoraLayer] = {}
            for target in names:
                if not check_target_module_exists(config, target):
                    continue
                module, (parent, _, child) = tuner.model.get_submodule(target), target.rpartition(".")
                with torch.device("meta"):
                    tuner._create_and_replace(
                        empty, name, module, child, tuner.model.get_submodule(parent), current_key=target
                    )
                layers[target] = tuner.model.get_submodule(target)
                if layers[target] is not module:
                    layers[target].set_adapter(tuner.active_adapters, inference_mode=True)
            shapes = {
                f".{name}.".join(key.rsplit(".", 1)): each.shape for key, each in tensors_of(layers, name).items()
            }
            found = {f".{name}.".join(key.rsplit(".", 1)): each for key, each in tensors.items()}
            check_tensors(found, shapes, name, complete=True)
            for target, layer in layers.items():
                device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                for key in tensors_of({target: layer}, name):
                    matrix, leaf = key.removeprefix(f"{prefix}{target}.").split(".")
                    tensor = tensors[key]
                    dtype = dtype if dtype is not None and dtype.is_floating_point else tensor.dtype
                    own = torch.float32 if autocast_adapter_dtype and dtype.itemsize < 4 else dtype
                    weight = nn.Parameter(tensor.to(device, own), requires_grad=False)
                    setattr(getattr(layer, matrix)[name], leaf, weight)
            tuner.peft_config[name].fan_in_fan_out = empty.fan_in_fan_out  # PEFT corrects it for the layer's type
            known = set(tuner.targeted_module_names)
            tuner.targeted_module_names.extend(target for target in layers if target not in known)
            layers_of[name] = layers
            if ATTRIBUTION_KEY in tensors:
                check_attribution(name, config.attribution_layout, tensors[ATTRIBUTION_KEY])
                if config.attribution_layout:
                    tuner.attribution[name] = tensors[ATTRIBUTION_KEY].detach().float().cpu()
        for parameter in trained:
            parameter.requires_grad_(True)
        tuner.sync_history()
        for name, (_, tensors) in adapters.items():
            store_inputs(layers_of[name], name, tensors)
    except BaseException:  # Ctrl-C in a notebook too, where the model lives on
        for name in adapters:
            tuner.take_out(name, trained)
        raise
