"""Does an adapter on the disk fit this base model? Answered before the model is touched.

Names, shapes and completeness of the tensors in the file are compared with the modules of the base model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuner.history import chain_obstacles, check_adapter_name
from ..tuner.persistence import ATTRIBUTION_KEY
from .errors import ChainError
from .reading import AdapterFile

PREFIX = "base_model.model."
_DOWN = ("lora_A.weight", "lora_embedding_A")
_UP = ("lora_B.weight", "lora_embedding_B")
# where the vocabulary was resized, PEFT writes a head in modules_to_save once more, and the base model's own
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."
_SUFFIXES = (*_DOWN, *_UP, "lora_B.bias", "lora_magnitude_vector")


@dataclass(frozen=True)
class BaseView:
    """A base model as it was before PEFT put anything into it.

    Attributes:
        modules: name -> module; of an adapted layer the base layer, of a copied head the original.
        weights: name -> parameter or buffer.
    """

    modules: dict[str, nn.Module]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> BaseView:
        """The view of a bare model, or of the model inside a PEFT tuner."""
        modules: dict[str, nn.Module] = {}
        seen: set[int] = set()

        def visit(module: nn.Module, name: str) -> None:
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module = module.original_module
            if id(module) not in seen:  # a module that has two names counts once, as in named_modules
                seen.add(id(module))
                modules[name] = module
                for child_name, child in module.named_children():
                    visit(child, f"{name}.{child_name}" if name else child_name)

        visit(model, "")
        weights = {
            f"{name}.{key}" if name else key: tensor
            for name, module in modules.items()
            for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        }
        return cls(modules, weights)


def check_fit(adapter: AdapterFile, weights: Mapping[str, torch.Tensor], base: BaseView) -> dict[str, torch.Tensor]:
    """Check an adapter against the base model and return the tensors that may be loaded.

    Tensors of the base model that PEFT saves beside an adapter on embeddings, or where the vocabulary was resized, are
    compared with the model's own and left out: what all tasks share is not changed by loading one of them.

    Raises:
        ChainError: a module that the model does not have, a tensor of another shape, weights that are missing
            or that the config does not account for, a base weight that differs from the model's.
    """
    lora, others = _split(weights)
    modules = base.modules
    if not lora:
        raise ChainError(
            f"The file of {adapter.name!r} ({adapter.path}) holds no LoRA matrices, only "
            f"{sorted(weights)[:3]}. Save the adapter again."
        )
    for name, matrices in lora.items():
        if isinstance(modules.get(name), nn.MultiheadAttention):
            raise ChainError(
                f"{adapter.name!r} has weights for {name}, a MultiheadAttention, which cannot carry a "
                "history. Load it alone, with PeftModel.from_pretrained."
            )
        if name not in modules:
            raise ChainError(
                f"The adapter {adapter.name!r} does not fit this model, which has no module {name!r}. It "
                f"was made for another base model{_base_hint(adapter)}."
            )
        _check_pair(adapter, name, matrices, modules[name])
    if not any(True for _ in chain_obstacles(adapter.config)):
        _check_coverage(adapter, lora, modules)
    own = base.weights
    kept = dict(weights)
    for key, tensor in others.items():
        if tied := _tied_heads(adapter, key, own):
            _check_tied(adapter, key, tensor, [others[head] for head in tied if head in others])
        elif _is_base_copy(adapter, key) or _ORIGINAL in key:
            _check_base_copy(adapter, key, tensor, own)
            del kept[key]
        elif _COPY in key:
            _check_second_copy(adapter, key, tensor, others)
            del kept[key]
        else:
            _check_head(adapter, key, tensor, own)
    _check_heads_present(adapter, others, modules)
    return kept


def check_name(name: str, base: nn.Module) -> None:
    """Refuse a task name that cannot be the name of an adapter in this model.

    Raises:
        ChainError: as `check_adapter_name`, with the way out.
    """
    try:
        check_adapter_name(name, base)
    except ValueError as error:
        raise ChainError(
            f"{error} To rename a task that is saved already, change task_name in its adapter_config.json, "
            "and history in those of the tasks after it."
        ) from error


def in_out(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a linear, embedding or convolution layer (quantized ones too), or None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    for inputs, outputs in (
        ("in_features", "out_features"),
        ("num_embeddings", "embedding_dim"),
        ("in_channels", "out_channels"),
    ):
        sizes = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None


def _split(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Module -> its LoRA tensors by ending, and all other tensors, both without PEFT's prefix."""
    lora: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    others: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in _SUFFIXES if name.endswith("." + ending)), None)
        if ending is not None:
            lora[name.removesuffix("." + ending)][ending] = tensor
        elif key != ATTRIBUTION_KEY:
            others[key] = tensor
    return dict(lora), others


def _check_pair(adapter: AdapterFile, name: str, matrices: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    """A and B of one module: both there, of one rank, of the module's sizes."""
    down = next((matrices[ending] for ending in _DOWN if ending in matrices), None)
    up = next((matrices[ending] for ending in _UP if ending in matrices), None)
    if down is None or up is None or down.dim() < 2 or up.dim() < 2:
        raise ChainError(
            f"The file of {adapter.name!r} lacks one of the two matrices of {name} ({adapter.path}). It is "
            "incomplete: save or download it again."
        )
    ranks = adapter.config.rank_pattern
    rank = ranks.get(get_pattern_key(ranks.keys(), name), adapter.config.r)
    if down.shape[0] != rank:
        raise ChainError(
            f"{name} has rank {down.shape[0]} in the file of {adapter.name!r} and {rank} in its config: "
            f"adapter_config.json and the weights in {adapter.path} do not belong together."
        )
    groups = getattr(module, "groups", 1)  # of a convolution: PEFT gives them to B alone
    if down.shape[0] != up.shape[1] * groups:
        raise ChainError(
            f"The two matrices of {name} in the file of {adapter.name!r} have different ranks: A is "
            f"{tuple(down.shape)}, B is {tuple(up.shape)}. The file is damaged: save it again."
        )
    sizes = in_out(module)
    if sizes is not None and (down.shape[1], up.shape[0]) != sizes:
        raise ChainError(
            f"The adapter {adapter.name!r} does not fit this model: {name} maps {down.shape[1]} to "
            f"{up.shape[0]} values in the file (A {tuple(down.shape)}, B {tuple(up.shape)}) and {sizes[0]} "
            f"to {sizes[1]} in the model. It was made for another base model{_base_hint(adapter)}."
        )


def _check_coverage(adapter: AdapterFile, lora: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """The modules in the file are those that the config names."""
    targets = adapter.config.target_modules
    # what PEFT works out from the model, or ties to another module, is left to PEFT
    if targets is None or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND or adapter.config.ensure_weight_tying:
        return
    named = {name for name in modules if name and check_target_module_exists(adapter.config, name)}
    if lacking := sorted(named - set(lora)):
        raise ChainError(
            f"The file of {adapter.name!r} has no weights for {lacking[0]}"
            f"{f' and {len(lacking) - 1} more modules' if lacking[1:] else ''}, which its config names as "
            f"targets. It is incomplete, or was made for another base model{_base_hint(adapter)}."
        )
    if surplus := sorted(set(lora) - named):
        raise ChainError(
            f"The file of {adapter.name!r} has weights for {surplus[0]}, which its config does not name as "
            f"a target: adapter_config.json and the weights in {adapter.path} do not belong together."
        )


def _heads(adapter: AdapterFile) -> tuple[str, ...]:
    return tuple(adapter.config.modules_to_save or ())


def _is_base_copy(adapter: AdapterFile, key: str) -> bool:
    """True for the base model's own weights, which PEFT saves with targeted or resized embeddings."""
    module = key.removeprefix(PREFIX).rpartition(".")[0]
    return not any(part.endswith(_heads(adapter)) for part in _prefixes(module))


def _prefixes(module: str) -> Iterator[str]:
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _check_base_copy(adapter: AdapterFile, key: str, tensor: torch.Tensor, own: Mapping[str, torch.Tensor]) -> None:
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(_ORIGINAL, ".")
    held = own.get(name)
    if held is None:
        raise ChainError(
            f"The file of {adapter.name!r} holds a tensor {key!r} that belongs to nothing in this model and "
            f"to no setting of its config. It was made for another base model{_base_hint(adapter)}."
        )
    if held.shape != tensor.shape:
        raise ChainError(
            f"The adapter {adapter.name!r} does not fit this model: {name} has shape {tuple(tensor.shape)} "
            f"in the file and {tuple(held.shape)} here. If tokens were added before it was trained, call "
            f"model.resize_token_embeddings({tensor.shape[0]}) on the base model and load the new rows into "
            "it first."
        )
    if held.device.type != "meta" and not _same_values(tensor, held):
        raise ChainError(
            f"The file of {adapter.name!r} brings its own {name}, and it differs from the base model's. All "
            "tasks share the base model, so loading it would change the others. If these are the right "
            "values, load them into the base model yourself before load_chain (base.load_state_dict(..., "
            "strict=False))."
        )


def _tied_heads(adapter: AdapterFile, key: str, own: Mapping[str, torch.Tensor]) -> list[str]:
    """The weights of modules in `modules_to_save` that this one is tied to; PEFT then saves and loads both."""
    held = own.get(key.removeprefix(PREFIX))
    if held is None or not adapter.config.ensure_weight_tying or not _is_base_copy(adapter, key):
        return []
    same = [f"{PREFIX}{name}" for name, tensor in own.items() if tensor is held]
    return [name for name in same if not _is_base_copy(adapter, name)]


def _check_tied(adapter: AdapterFile, key: str, tensor: torch.Tensor, heads: Sequence[torch.Tensor]) -> None:
    if any(head.shape != tensor.shape or not _same_values(tensor, head) for head in heads):
        raise ChainError(
            f"The file of {adapter.name!r} ({adapter.path}) has other values for {key.removeprefix(PREFIX)} than for "
            "the module that it is tied to. It is damaged: save or download it again."
        )


def _check_second_copy(
    adapter: AdapterFile, key: str, tensor: torch.Tensor, others: Mapping[str, torch.Tensor]
) -> None:
    """A head that is in the file twice is the same both times; where it is missing, that is said later."""
    first = others.get(key.replace(_COPY, "."))
    if first is not None and (first.shape != tensor.shape or not _same_values(tensor, first)):
        raise ChainError(
            f"The file of {adapter.name!r} ({adapter.path}) holds {key.removeprefix(PREFIX)} twice, with different "
            "values. It is damaged: save or download it again."
        )


def _same_values(tensor: torch.Tensor, held: torch.Tensor) -> bool:
    """Equal up to the rounding of the coarser of the two dtypes."""
    if not held.is_floating_point():
        return torch.equal(tensor, held.cpu())
    coarse = max(tensor.dtype, held.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(tensor.to(coarse), held.cpu().to(coarse))


def _check_head(adapter: AdapterFile, key: str, tensor: torch.Tensor, own: Mapping[str, torch.Tensor]) -> None:
    held = own.get(key.removeprefix(PREFIX))
    if held is None or held.shape != tensor.shape:
        here = "the model has no such weight" if held is None else f"it is {tuple(held.shape)} in the model"
        raise ChainError(
            f"The adapter {adapter.name!r} does not fit this model: its {key.removeprefix(PREFIX)} has "
            f"shape {tuple(tensor.shape)}, and {here}. A head of its own needs a base model with the same "
            "head: for a classifier, the same num_labels."
        )


def _check_heads_present(
    adapter: AdapterFile, others: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> None:
    """Every weight of the modules in `modules_to_save` is in the file."""
    heads = [name for name in modules if name and _heads(adapter) and name.endswith(_heads(adapter))]
    for name in heads:
        for weight in modules[name].state_dict():
            if f"{PREFIX}{name}.{weight}" not in others:
                raise ChainError(
                    f"The file of {adapter.name!r} lacks {name}.{weight}, and its config says that {name} "
                    f"is saved with it (modules_to_save={sorted(set(_heads(adapter)))}). Save the adapter "
                    "again."
                )


def _base_hint(adapter: AdapterFile) -> str:
    base = adapter.config.base_model_name_or_path
    return f" (its config says {base!r})" if base else ""
