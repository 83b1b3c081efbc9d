"""What the tests compare with: Eq. 9 written out anew, and how far two sets of scores are apart."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import IntegratedGradients
from torch import nn

from peft_aso.attribution import AttributionConfig, AttributionVector, attribute, find_neurons

Batch = dict[str, torch.Tensor]


def largest_gap(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference in a row as a share of its largest entry, the worst row."""
    return float(((ours - reference).abs().amax(1) / reference.abs().amax(1)).max())


def run(model: nn.Module, batch: Batch, method: str = "auto", **settings: Any) -> AttributionVector:
    """Three even steps where the settings do not say otherwise."""
    config = AttributionConfig(**{"steps": 3, "quadrature": "riemann", **settings})
    return attribute(model, batch, config, method=method)


def is_causal_lm(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def answer_probability(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Eq. 9 written out anew: P of each row, float64."""
    inputs, labels = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels), "use_cache": False}
    logs = torch.log_softmax(model(**inputs).logits.double(), -1)
    if labels.ndim == 1:
        return logs.gather(-1, labels[:, None])[:, 0].exp()
    if is_causal_lm(model):
        logs, labels = logs[:, :-1], labels[:, 1:]
    chosen = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != -100)).sum(1).exp()


def scaled_positions(model: nn.Module, batch: Batch, name: str) -> torch.Tensor:
    """Where the neurons of `name` are scaled, with a last dimension of 1."""
    answered = batch["labels"] != -100
    if is_causal_lm(model):
        return torch.cat([answered[:, 1:], torch.zeros_like(answered[:, :1])], 1)[..., None]
    own = model.config.is_encoder_decoder and "decoder" in name.split(".")
    return (answered if own else batch["attention_mask"].bool())[..., None]


def captum_scores(model: nn.Module, batch: Batch, steps: int) -> torch.Tensor:
    """Captum's IntegratedGradients, layer by layer, through a forward pass whose neurons are put in by hand."""
    found = []
    for layer in find_neurons(model):
        where, seen = scaled_positions(model, batch, layer.name), []
        with torch.no_grad(), layer.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            answer_probability(model, batch)

        def forward(scaled: torch.Tensor, module: nn.Module = layer.module, where: torch.Tensor = where):
            times = len(scaled) // len(where)

            def put(_: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
                return torch.where(where.repeat(times, 1, 1), scaled, args[0].view_as(scaled)).view_as(args[0])

            with module.register_forward_pre_hook(put):
                return answer_probability(model, {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in batch.items()})

        neurons = seen[0].view(*where.shape[:2], -1)
        scores = IntegratedGradients(forward).attribute(neurons, n_steps=steps, method="riemann_right")
        found.append((scores * where).sum(1))
    return torch.cat(found, 1)
