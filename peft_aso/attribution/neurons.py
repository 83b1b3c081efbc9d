"""The FFN neurons of a transformer (Eq. 8): the inputs of each block's down projection.

They are found by structure, not by a list of model names. Among the linear layers of a block that are not
part of its attention, the down projection is the last one mapping f features to h, for which an earlier one
maps h to f (or to 2f, where gate and up projection are one matrix).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn

_SETTING = "`AttributionConfig(neurons=...)`"
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

    def by_position(self, neurons: torch.Tensor, rows: int, positions: int) -> torch.Tensor:
        """What the down projection is given, as `(rows, positions, size)`; OPT flattens rows and positions.

        Raises:
            ValueError: it is not one vector for each position (experts see some tokens only).
        """
        if neurons.numel() != rows * positions * self.size:
            raise ValueError(
                f"The input of {self.name} has shape {tuple(neurons.shape)}, not one vector of {self.size} for each "
                f"of {rows} x {positions} positions. Leave it out with {_SETTING}."
            )
        return neurons.reshape(rows, positions, self.size)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DistributedDataParallel and PEFT, in whatever order.

    Raises:
        ValueError: a PEFT model of the prompt-learning kind, whose virtual tokens live in the wrapper.
    """
    while True:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "Attribution cannot follow prompt-learning adapters (prompt, prefix or P-tuning), which add tokens "
                "outside of the model. Use an adapter that lives in the layers, such as LoRA."
            )
        base = getattr(model, "get_base_model", None)
        for inner in (getattr(model, "_orig_mod", None), getattr(model, "module", None), base() if base else None):
            if isinstance(inner, nn.Module) and inner is not model:
                model = inner
                break
        else:
            return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients inside; each module's training flag and the random state are restored afterwards.

    Works under the caller's `no_grad` and `inference_mode`.
    """
    training = {module: module.training for module in model.modules()}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        # weights that autocast has cast without a gradient must not be found by the caller's training step
        torch.clear_autocast_cache()


def find_neurons(
    model: nn.Module, neurons: str | Sequence[str] | None = None, stacks: str = "all"
) -> list[NeuronLayer]:
    """Every FFN down projection of `model`, in the order of `named_modules()`.

    Args:
        model: a transformers model; wrappers are looked through.
        neurons: None finds them by structure. A string is a regular expression that must match the whole
            module name; a list holds suffixes of module names, as PEFT's `target_modules` does.
        stacks: "all", or only the "encoder" or the "decoder" of an encoder-decoder.

    Raises:
        ValueError: none found, experts in a block, a setting that matches no linear layer, a stack without neurons.
    """
    model = unwrap(model)
    names = {module: name for name, module in model.named_modules()}
    lists = _lists_of_blocks(model)
    if neurons is None:
        downs = [_down_projection(block, names) for _, blocks in lists for block in blocks]
        found = {down for down in downs if down is not None}
        if not found:
            raise ValueError(
                f"There is no FFN down projection in {type(model).__name__}: no block has a linear layer from h to f "
                f"features followed by one from f to h. Name them with {_SETTING}: a regular expression for whole "
                "module names, or a list of suffixes such as ['down_proj']."
            )
    else:
        found = _named(model, neurons)
    where = {block: (prefix, blocks, index) for prefix, blocks in lists for index, block in enumerate(blocks)}
    owner = {module: block for block in where for module in block.modules()}
    layers = []
    for module, name in names.items():
        widths = _widths(module)
        if module not in found or widths is None:
            continue
        block = owner.get(module)
        prefix, blocks, index = where[block] if block is not None else (name, [], -1)
        stack = "single"
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            stack = "decoder" if "decoder" in prefix.split(".") else "encoder"
        layers.append(NeuronLayer(name, module, widths[0], block, index, stack, blocks))
    if stacks != "all":
        layers = [layer for layer in layers if layer.stack == stacks]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no FFN neurons in a stack {stacks!r}. Use stacks='all'.")
    return layers


def rows_that_fit(
    model: nn.Module, layers: list[NeuronLayer], positions: int, keys: int, logits: int, copied: int = 0
) -> tuple[int, float]:
    """How many rows run at once in a pass with gradients: as many as a part of the free memory holds, and no more than
    pays; and which part of a row's memory does not depend on how many blocks run.

    Args:
        positions: tokens of a row that run, of `keys` that each attends to.
        logits: positions at which logits are computed.
        copied: tokens whose keys and values are copied for each row.
    """
    text: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    hidden = int(getattr(text, "hidden_size", None) or layers[0].size // 4)
    heads, vocabulary = int(getattr(text, "num_attention_heads", None) or 16), int(getattr(text, "vocab_size", 0) or 0)
    blocks = max(len(layer.blocks) for layer in layers) or 1
    activations = 4 * blocks * positions * (10 * hidden + 4 * max(layer.size for layer in layers))
    besides = 8 * blocks * (positions * heads * keys + hidden * copied) + 12 * logits * vocabulary
    device = next(model.parameters()).device
    free, most = 2 * 2**30, 512  # where the free memory is not known
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free, most = (torch.cuda.mem_get_info(device)[0] + unused) // 2, 4096
    elif device.type == "cpu":
        free = psutil.virtual_memory().available // 4
    return max(1, min(most, free // (activations + besides))), besides / (activations + besides)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output features of nn.Linear, transformers' Conv1D, quantized linears and adapters around them."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
    base = getattr(module, "base_layer", None)
    return _widths(base) if isinstance(base, nn.Module) else None


def _lists_of_blocks(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """The outermost lists of modules: (name, blocks)."""
    found: list[tuple[str, list[nn.Module]]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found.append((name, list(module)))
    return found


def _outside_attention(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is below it, down to the linear layers, without attention; in order of registration."""
    yield module
    if _widths(module) is None:
        for name, child in module.named_children():
            if not (_ATTENTION.search(name) or _ATTENTION.search(type(child).__name__)):
                yield from _outside_attention(child)


def _last_down(block: nn.Module) -> nn.Module | None:
    linears = [(module, _widths(module)) for module in _outside_attention(block)]
    known = [(module, widths) for module, widths in linears if widths is not None]
    for index in range(len(known) - 1, 0, -1):
        module, (size, hidden) = known[index]
        if any(given == hidden and made in (size, 2 * size) for _, (given, made) in known[:index]):
            return module
    return None


def _down_projection(block: nn.Module, names: dict[nn.Module, str]) -> nn.Module | None:
    """The block's down projection; ValueError for a mixture of experts, which has no single one."""
    for module in _outside_attention(block):
        fused = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        experts = fused and not isinstance(module, nn.modules.conv._ConvNd)
        if isinstance(module, nn.ModuleList):
            experts = sum(_last_down(element) is not None for element in module) > 1
        if experts:
            raise ValueError(
                f"{names[module]} looks like a mixture of experts: a token passes through some of its FFNs only. "
                f"Name the modules to attribute with {_SETTING}, for instance the dense or shared FFNs."
            )
    return _last_down(block)


def _named(model: nn.Module, neurons: str | Sequence[str]) -> set[nn.Module]:
    linears = {name: module for name, module in model.named_modules() if _widths(module) is not None}
    if isinstance(neurons, str):
        try:
            pattern = re.compile(neurons)
        except re.error as error:
            raise ValueError(f"neurons={neurons!r} is not a regular expression: {error}.") from None
        found = {module for name, module in linears.items() if pattern.fullmatch(name)}
    else:
        endings = tuple("." + suffix for suffix in neurons)
        found = {module for name, module in linears.items() if ("." + name).endswith(endings)}
    if not found:
        raise ValueError(
            f"neurons={neurons!r} matches no linear layer of {type(model).__name__}. A string is a regular "
            "expression for the whole module name, a list has suffixes; linear layers here are "
            f"{', '.join(list(linears)[:6])}, ..."
        )
    return found
