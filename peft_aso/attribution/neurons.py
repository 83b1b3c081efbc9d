"""Finding the FFN neurons of a transformer (Eq. 8): the inputs of each block's down projection.

They are found by structure, not by a list of model names. Among the linear layers of a block that are not
part of its attention, the down projection is the last one mapping f features to h, for which an earlier one
maps h to f (or to 2f, where gate and up projection are one matrix).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

_SETTING = "`neurons=` of compute_attribution, or `AttributionConfig(neurons=...)`"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass
class NeuronLayer:
    """One FFN's neurons.

    Attributes:
        name: name of the down projection in the transformers model (without wrappers).
        module: the down projection, whose input is the neurons; the wrapper where an adapter wraps it.
        size: number of neurons, N of this layer.
        block: the transformer block that holds it, None where a manual setting points outside all blocks.
        block_index: the block's place in its stack, -1 without a block.
        stack: "encoder" or "decoder" for encoder-decoder models, "single" otherwise.
        blocks: all blocks of that stack, lowest first.
    """

    name: str
    module: nn.Module
    size: int
    block: nn.Module | None
    block_index: int
    stack: str
    blocks: list[nn.Module] = field(default_factory=list, repr=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DistributedDataParallel and PEFT, in whatever order.

    Raises:
        ValueError: a PEFT model of the prompt-learning kind, whose virtual tokens live in the wrapper.
    """
    while True:
        settings = getattr(model, "active_peft_config", None)
        if getattr(settings, "is_prompt_learning", False):
            raise ValueError(
                "prompt-learning adapters (prompt, prefix or P-tuning) put tokens in front of the model from "
                "outside, which attribution cannot follow; use an adapter that lives in the layers, such as "
                "LoRA"
            )
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        elif callable(getattr(model, "get_base_model", None)) and model.get_base_model() is not model:  # type: ignore[operator]
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def find_neurons(model: nn.Module, neurons: str | Sequence[str] | None = None) -> list[NeuronLayer]:
    """Every FFN down projection of `model`, in the order of `named_modules()`.

    Args:
        model: a transformers model; wrappers are looked through.
        neurons: None finds them by structure. A string is a regular expression that must match the whole
            module name; a list holds suffixes of module names, as PEFT's `target_modules` does.

    Raises:
        ValueError: none found, experts (fused or in a list) in a block, or a setting that matches no linear
            layer.
    """
    model = unwrap(model)
    names = {module: name for name, module in model.named_modules()}
    stacks = _stacks(model)
    if neurons is None:
        found = [down for _, blocks in stacks for block in blocks if (down := _down_projection(block, names))]
        if not found:
            raise ValueError(
                f"no FFN down projection found in {type(model).__name__}: no block has a linear layer from "
                f"its hidden size to f features followed by one back from f. Name them with {_SETTING}: a "
                "regular expression for whole module names, or a list of suffixes such as ['down_proj']"
            )
    else:
        found = _named(model, neurons)
    where = {block: (prefix, blocks, index) for prefix, blocks in stacks for index, block in enumerate(blocks)}
    owner = {module: block for block in where for module in block.modules()}
    order = {module: index for index, module in enumerate(names)}
    return [_layer(model, module, names, owner, where) for module in sorted(set(found), key=lambda m: order[m])]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, transformers' Conv1D, quantized linears and adapters around them: all say their two
    widths."""
    return _widths(module) is not None


def _widths(module: nn.Module) -> tuple[int, int] | None:
    for names in (("in_features", "out_features"), ("nx", "nf")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
    base = getattr(module, "base_layer", None)
    return _widths(base) if isinstance(base, nn.Module) else None


def _stacks(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """The outermost lists of modules: (name, blocks)."""
    found: list[tuple[str, list[nn.Module]]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found.append((name, list(module)))
    return found


def _linears(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, int, int]]:
    """(name, module, in, out) of the linear layers below `module`, attention left out, in order of
    registration."""
    widths = _widths(module)
    if widths is not None:
        yield name, module, *widths
        return
    for child_name, child in module.named_children():
        if not (_ATTENTION.search(child_name) or _ATTENTION.search(type(child).__name__)):
            yield from _linears(child, f"{name}.{child_name}" if name else child_name)


def _down_projection(block: nn.Module, names: dict[nn.Module, str]) -> nn.Module | None:
    _refuse_experts(block, names)
    linears = list(_linears(block))
    return _last_down([(module, width_in, width_out) for _, module, width_in, width_out in linears])


def _last_down(linears: list[tuple[nn.Module, int, int]]) -> nn.Module | None:
    for index in range(len(linears) - 1, 0, -1):
        module, size, hidden = linears[index]
        if any(width_in == hidden and width_out in (size, 2 * size) for _, width_in, width_out in linears[:index]):
            return module
    return None


def _refuse_experts(block: nn.Module, names: dict[nn.Module, str]) -> None:
    """A mixture of experts has no single input of a down projection: ValueError that names the setting."""
    culprit = None
    for module in _outside_attention(block):
        fused = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        if fused and not isinstance(module, nn.modules.conv._ConvNd):
            culprit = module
        if isinstance(module, nn.ModuleList):
            downs = [_last_down([(m, i, o) for _, m, i, o in _linears(element)]) for element in module]
            if sum(down is not None for down in downs) > 1:
                culprit = module
        if culprit is not None:
            raise ValueError(
                f"{names[culprit]} looks like a mixture of experts: a token passes through some of its FFNs "
                "only, so its neurons cannot be found by structure. Name the modules to attribute with "
                f"{_SETTING}, for instance the dense or shared FFNs of the model"
            )


def _outside_attention(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    if _widths(module) is not None:
        return
    for name, child in module.named_children():
        if not (_ATTENTION.search(name) or _ATTENTION.search(type(child).__name__)):
            yield from _outside_attention(child)


def _named(model: nn.Module, neurons: str | Sequence[str]) -> list[nn.Module]:
    if isinstance(neurons, str):
        try:
            pattern = re.compile(neurons)
        except re.error as error:
            raise ValueError(f"neurons={neurons!r} is not a regular expression: {error}") from None
        matched = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    else:
        suffixes = tuple(neurons)
        matched = [
            module
            for name, module in model.named_modules()
            if any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)
        ]
    found = [module for module in matched if is_linear(module)]
    if not found:
        examples = [name for name, module in model.named_modules() if is_linear(module)][:6]
        raise ValueError(
            f"neurons={neurons!r} matches no linear layer of {type(model).__name__}. A string is a regular "
            "expression for the whole module name, a list holds suffixes; linear layers here are "
            + ", ".join(examples)
            + ", ..."
        )
    return found


def _layer(
    model: nn.Module,
    module: nn.Module,
    names: dict[nn.Module, str],
    owner: dict[nn.Module, nn.Module],
    where: dict[nn.Module, tuple[str, list[nn.Module], int]],
) -> NeuronLayer:
    widths = _widths(module)
    assert widths is not None
    block = owner.get(module)
    prefix, blocks, index = where[block] if block is not None else (names[module], [], -1)
    stack = "single"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        stack = "decoder" if "decoder" in prefix.split(".") else "encoder"
    return NeuronLayer(names[module], module, widths[0], block, index, stack, blocks)
