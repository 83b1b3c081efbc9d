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

_SETTING = "the setting `neurons` of AttributionConfig"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass
class NeuronLayer:
    """One FFN's neurons.

    Attributes:
        name: name of the down projection in the transformers model (without wrappers).
        module: the down projection, whose input is the neurons; the wrapper where an adapter wraps it.
        size: number of neurons, N of this layer.
        stack: "encoder" or "decoder" for encoder-decoder models, "single" otherwise.
        blocks: all blocks of that stack, lowest first; none where a manual setting names a layer outside of them.
        block_index: the place of the layer's own block among them, -1 without one.
    """

    name: str
    module: nn.Module
    size: int
    stack: str
    blocks: list[nn.Module] = field(repr=False)
    block_index: int

    @property
    def block(self) -> nn.Module | None:
        """The transformer block that holds the layer."""
        return self.blocks[self.block_index] if self.blocks else None

    def by_position(self, neurons: torch.Tensor, rows: int, positions: int) -> torch.Tensor:
        """The down projection's input as `(rows, positions, size)`; OPT flattens rows and positions.

        Raises:
            ValueError: it does not have one vector for each position (experts see some tokens only).
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
        model: a transformers model, with or without wrappers.
        neurons: None finds them by structure. A string is a regular expression that must match the full
            module name; a list holds suffixes of module names, as PEFT's `target_modules` does.
        stacks: "all", or only the "encoder" or the "decoder" of an encoder-decoder.

    Raises:
        ValueError: none found, experts in a block, a setting that matches no linear layer, a stack without neurons.
    """
    model = unwrap(model)
    named = dict(model.named_modules())
    owner: dict[nn.Module, tuple[str, list[nn.Module], int]] = {}  # module -> its list of blocks, and which of them
    for name, module in named.items():
        if isinstance(module, nn.ModuleList) and module not in owner:  # the outermost lists
            blocks = list(module)
            for index, block in enumerate(blocks):
                owner.update(dict.fromkeys(block.modules(), (name, blocks, index)))
    if neurons is None:
        blocks = [module for module, (_, blocks, index) in owner.items() if module is blocks[index]]
        found = {_down_projection(block, named) for block in blocks} - {None}
        if not found:
            raise ValueError(
                f"There is no FFN down projection in {type(model).__name__}: no block has a linear layer from h to f "
                f"features followed by one from f to h. Name them with {_SETTING}: a regular expression for full "
                "module names, or a list of suffixes such as ['down_proj']."
            )
    else:
        found = set(_matching(model, neurons))
    layers = []
    for name, module in named.items():
        widths = _widths(module)
        if module in found and widths is not None:
            prefix, blocks, index = owner.get(module, (name, [], -1))
            stack = "single"
            if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                stack = "decoder" if "decoder" in prefix.split(".") else "encoder"
            if stacks in ("all", stack):
                layers.append(NeuronLayer(name, module, widths[0], stack, blocks, index))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no FFN neurons in a stack {stacks!r}. Use stacks='all'.")
    return layers


def rows_that_fit(
    model: nn.Module, layers: list[NeuronLayer], positions: int, keys: int, logits: int, copied: int = 0
) -> int:
    """How many rows run at once in a pass with gradients: what a part of the free memory holds, up to a limit.

    Args:
        positions: tokens of a row that run; each attends to `keys` tokens.
        logits: positions of a row at which logits are computed.
        copied: tokens whose keys and values are copied for each row.
    """
    text: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    hidden, heads, vocabulary = (
        int(getattr(text, name, None) or default)
        for name, default in (("hidden_size", layers[0].size // 4), ("num_attention_heads", 16), ("vocab_size", 0))
    )
    activations = positions * (10 * hidden + 4 * max(layer.size for layer in layers) + 2 * heads * keys)  # of a block
    row = (
        4 * max(len(layer.blocks) for layer in layers) * (activations + 2 * hidden * copied) + 12 * logits * vocabulary
    )
    device = next(model.parameters()).device
    free, most = 2 * 2**30, 512  # where the free memory is not known
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free, most = (torch.cuda.mem_get_info(device)[0] + unused) // 2, 4096
    elif device.type == "cpu":
        free = psutil.virtual_memory().available // 4
    return max(1, min(most, free // max(1, row)))


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output features of nn.Linear, transformers' Conv1D, quantized linears and adapters around them."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
    base = getattr(module, "base_layer", None)
    return _widths(base) if isinstance(base, nn.Module) else None


def _outside_attention(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is below it, down to the linear layers, without attention; in order of registration."""
    yield module
    if _widths(module) is None:
        for name, child in module.named_children():
            if not (_ATTENTION.search(name) or _ATTENTION.search(type(child).__name__)):
                yield from _outside_attention(child)


def _down_projection(block: nn.Module, named: dict[str, nn.Module]) -> nn.Module | None:
    """The block's down projection; ValueError for a mixture of experts, which has no single one."""
    inside = list(_outside_attention(block))
    for module in inside:
        fused = any(p.ndim == 3 for p in module.parameters(recurse=False)) and "Conv" not in type(module).__name__
        parts = module if isinstance(module, nn.ModuleList) else ()
        if fused or sum(_down_projection(part, named) is not None for part in parts) > 1:
            name = next(name for name, each in named.items() if each is module)
            raise ValueError(
                f"{name} looks like a mixture of experts: a token passes through some of its FFNs only. Name the "
                f"modules to attribute with {_SETTING}, for instance the dense or shared FFNs."
            )
    linears = [(module, widths) for module in inside if (widths := _widths(module)) is not None]
    for index, (module, (size, hidden)) in reversed(list(enumerate(linears))):
        if any(given == hidden and made in (size, 2 * size) for _, (given, made) in linears[:index]):
            return module
    return None


def _matching(model: nn.Module, neurons: str | Sequence[str]) -> list[nn.Module]:
    """The linear layers that the setting names."""
    linears = {name: module for name, module in model.named_modules() if _widths(module) is not None}
    if isinstance(neurons, str):
        try:
            found = [module for name, module in linears.items() if re.fullmatch(neurons, name)]
        except re.error as error:
            raise ValueError(f"neurons={neurons!r} is not a regular expression: {error}.") from None
    else:
        endings = tuple("." + suffix for suffix in neurons)
        found = [module for name, module in linears.items() if ("." + name).endswith(endings)]
    if not found:
        raise ValueError(
            f"neurons={neurons!r} matches no linear layer of {type(model).__name__}. A string is a regular "
            "expression for the full module name, a list has suffixes. Some linear layers here: "
            f"{', '.join(list(linears)[:6])}."
        )
    return found
