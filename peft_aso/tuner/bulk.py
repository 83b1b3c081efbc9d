"""Many saved adapters into one model at once.

PEFT walks the whole model several times for each adapter that it adds and loads, and the adapters that are there make
every walk longer: loading T of them takes a time that grows with T^2. Here each layer is told of each adapter through
PEFT's own door for one module, without memory; the weights then take their places; and what concerns the model as a
whole is done once. The result is that of PEFT's way (`add_adapter`, then `set_peft_model_state_dict`).
"""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils import UPCAST_DTYPES
from peft.utils.constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.overrides import TorchFunctionMode

from .checks import check_base_unchanged, check_layers, check_tensors
from .history import TaskHistory, check_chain, settle_history
from .persistence import ATTRIBUTION_KEY, check_attribution

if TYPE_CHECKING:
    from .model import ASOLoraModel

PREFIX = "base_model.model."
_HALF = {torch.float16, torch.bfloat16} | {getattr(torch, name) for name in UPCAST_DTYPES if hasattr(torch, name)}

# values of init_lora_weights that leave no trace once the weights are loaded
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# settings of PEFT's that may have any value here; all others have to be at their defaults
_PLAIN_SETTINGS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "lora_bias",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "loftq_config",
    "eva_config",
}  # fmt: skip
_FOR_ALL_ADAPTERS = ("set_adapter", "_move_adapter_to_device_of_base_layer")
_TYPES_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


class SavedAdapter(NamedTuple):
    """An adapter that was read from the disk, checked for NaN, and is not in the model yet.

    Attributes:
        name: what it is to be called.
        config: its `ASOLoraConfig`.
        weights: file key (`base_model.model.<module>.lora_A.weight` and so on, without the adapter's name) -> tensor.
            The model takes the tensors over.
    """

    name: str
    config: Any
    weights: Mapping[str, torch.Tensor]


def fits_bulk(adapter: SavedAdapter) -> bool:
    """Whether the adapter is nothing but A and B (and biases) for the modules in its file.

    All else goes PEFT's way: whatever copies or changes something of the base model, has targets that PEFT works out
    from the model, or makes PEFT warn.
    """
    config, defaults = adapter.config, LoraConfig()
    names = {field.name for field in fields(LoraConfig)} - _PLAIN_SETTINGS
    if any(getattr(config, name) and getattr(config, name) != getattr(defaults, name) for name in names):
        return False
    targets = config.target_modules
    if targets is None or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND or adapter.name in "lora_":
        return False
    if not isinstance(targets, str) and len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return False  # PEFT looks for a shorter list
    if config.project_init and config.peft_aso_version is None:
        return False
    plain = config.init_lora_weights in _PLAIN_STARTS and config.task_type not in _TYPES_WITH_HEADS
    return plain and _patterns_match(adapter)


def takes_bulk(tuner: ASOLoraModel) -> bool:
    """Whether the model has nothing that an added adapter would have to be told apart from: heads, merged weights."""
    modules = list(tuner.model.modules())
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules):
        return False
    return not any(module.merged for module in modules if isinstance(module, LoraLayer))


def add_saved(
    tuner: ASOLoraModel, adapters: Sequence[SavedAdapter], *, autocast: bool = True, on_added: Callable[[], Any] = int
) -> None:
    """Add adapters with their weights, all of them frozen. What is active and what trains does not change.

    Args:
        tuner: the model. An adapter that is in it already only gets its weights.
        adapters: those for which `fits_bulk` is true, in the order in which they were trained.
        autocast: as `autocast_adapter_dtype` of PEFT: float32 where the base model is in half precision.
        on_added: called after each adapter.

    Raises:
        ValueError: an adapter cannot be part of the chain (`HistoryError`), or its weights are not those that its
            config describes. The model is as before then.
    """
    new = [adapter.name for adapter in adapters if adapter.name not in tuner.peft_config]
    trained = [parameter for parameter in tuner.model.parameters() if parameter.requires_grad]
    try:
        _settle(tuner, [adapter for adapter in adapters if adapter.name in new])
        modules = dict(tuner.model.named_modules())
        place = {name: index for index, name in enumerate(modules)}
        with _left_to_the_end(modules.values()), _collector_paused():
            for adapter in adapters:
                targets = sorted(_modules_of(adapter), key=lambda name: place.get(name, -1))
                if adapter.name in new:
                    _make(tuner, adapter, targets, modules)
                on_added()
        _check_all_layers(tuner)
        for adapter in adapters:
            _fill(tuner, adapter, modules, autocast)
        tuner._sync_history()
    except BaseException:  # Ctrl-C in a notebook too, where the model lives on
        for name in reversed(new):
            tuner._take_out(name, trained)
        raise


def _settle(tuner: ASOLoraModel, adapters: Iterable[SavedAdapter]) -> None:
    """Enter the configs one after another, oldest first, and refuse what cannot be."""
    for adapter in adapters:
        config = tuner.peft_config[adapter.name] = copy.deepcopy(adapter.config)
        settle_history(adapter.name, tuner.peft_config)
        check_base_unchanged(adapter.name, tuner.peft_config)
        tuner._check_new_adapter_config(config)
    for task, history in _histories(tuner).items():
        check_chain(task, history, tuner.peft_config)


def _histories(tuner: ASOLoraModel) -> dict[str, tuple[str, ...]]:
    tasks = TaskHistory()
    tasks.refresh(tuner.peft_config)
    return tasks.histories


def _check_all_layers(tuner: ASOLoraModel) -> None:
    layers = tuner.lora_layers()
    for task, history in _histories(tuner).items():
        check_layers(layers, task, history)


def _make(tuner: ASOLoraModel, adapter: SavedAdapter, targets: Sequence[str], modules: dict[str, nn.Module]) -> None:
    """Make an adapter's layers without memory, in the modules of its file; `modules` gets the layers that are new."""
    config = tuner.peft_config[adapter.name]
    if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in targets):
        tuner._check_tied_modules(tuner.model, config)  # warns; it walks the whole model
    plain = copy.copy(config)
    plain.init_lora_weights = False
    for name in targets:
        if name not in modules:
            raise ValueError(
                f"The adapter {adapter.name!r} does not fit this model, which has no module {name!r}. It was made for "
                "another base model."
            )
        parent, _, child = name.rpartition(".")
        target = modules[name]
        tuner._check_target_module_compatiblity(config, tuner.model, child)
        with _WithoutMemory():
            tuner._create_and_replace(plain, adapter.name, target, child, modules[parent], current_key=name)
        if not isinstance(target, LoraLayer):
            modules[name] = layer = getattr(modules[parent], child)
            layer.set_adapter(tuner.active_adapters, inference_mode=True)
    config.fan_in_fan_out = plain.fan_in_fan_out  # PEFT mends it where the layers are of the other kind
    known = set(tuner.targeted_module_names)
    tuner.targeted_module_names.extend(name for name in targets if name not in known)


class _WithoutMemory(TorchFunctionMode):
    """New tensors take no memory and are not initialised: PyTorch's own initialisations cost more than all else."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        with torch.device("meta"):
            return func(*args, **kwargs)


@contextmanager
def _left_to_the_end(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What a layer does for all its adapters when it gets a new one, which makes T adapters cost T^2, is left out.

    It activates again what is active, and looks whether the new weights have to be moved; neither is needed here.
    """
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.__dict__.update(dict.fromkeys(_FOR_ALL_ADAPTERS, _nothing))
    try:
        yield
    finally:
        for layer in layers:
            for method in _FOR_ALL_ADAPTERS:
                del layer.__dict__[method]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's garbage collector looks through all that was made again and again, and none of it is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a method of one layer."""


def _fill(tuner: ASOLoraModel, adapter: SavedAdapter, modules: Mapping[str, nn.Module], autocast: bool) -> None:
    """Put an adapter's weights and its attribution vector where they belong; the weights are frozen."""
    name, config = adapter.name, tuner.peft_config[adapter.name]
    weights = dict(adapter.weights)
    vector = weights.pop(ATTRIBUTION_KEY, None)
    slots = {slot.file_key: slot for module in _modules_of(adapter) for slot in _slots(modules[module], module, name)}
    shapes = {slot.model_key: slot.holder[slot.key].shape for slot in slots.values()}
    found = {slots[key].model_key if key in slots else key: tensor for key, tensor in weights.items()}
    check_tensors(found, shapes, name, complete=True)
    if vector is not None and (config.peft_aso_version is not None or config.attribution_layout):
        check_attribution(name, config.attribution_layout, vector)
    for file_key, slot in slots.items():
        tensor = _placed(weights[file_key], slot.layer, autocast)
        slot.holder[slot.key] = nn.Parameter(tensor, requires_grad=False)
    tuner._take_weights(name, vector)


class _Slot(NamedTuple):
    """The place of one tensor of one adapter in the model."""

    layer: LoraLayer
    holder: Any  # `holder[key]` is the parameter
    key: str
    file_key: str
    model_key: str


def _slots(layer: LoraLayer, module: str, name: str) -> Iterator[_Slot]:
    """The places of an adapter's tensors in one layer."""
    for part in layer.adapter_layer_names:
        container = getattr(layer, part)
        if name not in container:
            continue
        file_key, model_key = f"{PREFIX}{module}.{part}", f"{PREFIX}{module}.{part}.{name}"
        if isinstance(container, nn.ParameterDict):
            yield _Slot(layer, container, name, file_key, model_key)
            continue
        parameters = container[name]._parameters
        for key in [key for key, parameter in parameters.items() if parameter is not None]:
            yield _Slot(layer, parameters, key, f"{file_key}.{key}", f"{model_key}.{key}")


def _placed(tensor: torch.Tensor, layer: LoraLayer, autocast: bool) -> torch.Tensor:
    """The tensor on the base layer's device, in the dtype that PEFT gives to a new adapter's weights there."""
    device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
        dtype = tensor.dtype
    return tensor.to(device, torch.float32 if autocast and dtype in _HALF else dtype)


def _modules_of(adapter: SavedAdapter) -> set[str]:
    """The modules for which the adapter has weights."""
    keys = (key.removeprefix(PREFIX) for key in adapter.weights)
    return {key[: key.rindex(".lora_")] for key in keys if ".lora_" in key}


def _patterns_match(adapter: SavedAdapter) -> bool:
    """Every pattern of a rank or an alpha is for some module; PEFT warns of those that are not."""
    patterns = {*adapter.config.rank_pattern, *adapter.config.alpha_pattern}
    modules = _modules_of(adapter) if patterns else set()
    return all(any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules) for pattern in patterns)
