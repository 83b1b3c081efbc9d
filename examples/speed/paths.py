"""How P changes along the path: the neurons of one layer scaled from zero to their values."""

from __future__ import annotations

from typing import Any

import torch

from peft_aso.attribution import find_neurons

from .batches import Batch


def probabilities(model: Any, batch: Batch, layer: str, nodes: torch.Tensor) -> torch.Tensor:
    """P(y* given x) of each example with the neurons of `layer` scaled by each node, `(K, B)`; forward passes alone.

    Args:
        model: a PEFT model with the adapters on that are to be looked at; causal, or an encoder-decoder.
        layer: a module name of the attribution's layout.
    """
    inner = model.get_base_model()
    labels = batch["labels"]
    seq2seq = inner.config.is_encoder_decoder
    if seq2seq and "decoder" in layer.split("."):
        where = labels != -100
    elif seq2seq:
        where = batch["attention_mask"].bool()
    else:
        where = torch.cat([labels[:, 1:] != -100, torch.zeros_like(labels[:, :1], dtype=torch.bool)], 1)
    found = []
    for node in nodes.tolist():

        def scale(_: Any, args: tuple[torch.Tensor], node: float = node) -> tuple[torch.Tensor]:
            own = args[0].view(*where.shape, -1)
            return (torch.where(where[..., None], own * node, own).view_as(args[0]),)

        hook = inner.get_submodule(layer).register_forward_pre_hook(scale)
        try:
            found.append(_probability(inner, batch, seq2seq))
        finally:
            hook.remove()
    return torch.stack(found)


@torch.no_grad()
def _probability(model: Any, batch: Batch, seq2seq: bool) -> torch.Tensor:
    labels = batch["labels"]
    logs = torch.log_softmax(model(**batch).logits.double(), -1)
    if not seq2seq:
        logs, labels = logs[:, :-1], labels[:, 1:]
    chosen = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != -100)).sum(1).exp()


def layers_of(model: Any) -> dict[str, str]:
    """The first, the middle and the last layer of neurons, by those words."""
    layers = [layer.name for layer in find_neurons(model.get_base_model())]
    return {"first": layers[0], "middle": layers[len(layers) // 2], "last": layers[-1]}


def narrowness(p: torch.Tensor) -> tuple[float, float]:
    """How much P changes in all, and which part of the path nine tenths of that take, medians over the examples.

    Args:
        p: `(K, B)`, at even nodes.
    """
    changes = p.diff(dim=0).abs()
    total = changes.sum(0)
    share = changes.sort(0, descending=True).values.cumsum(0) / total.clamp(min=1e-300)
    needed = ((share < 0.9).sum(0) + 1).double() / len(changes)
    return float(total.median()), float(needed.median())
