"""What the tests compare with: Eq. 9 written out anew, and how far two sets of scores are apart."""

from __future__ import annotations

import torch
from captum.attr import IntegratedGradients
from torch import nn

from peft_aso.attribution import find_neurons

Batch = dict[str, torch.Tensor]


def largest_gap(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference in a row as a share of its largest entry, the worst row."""
    return float(((ours - reference).abs().amax(1) / reference.abs().amax(1)).max())


def answer_probability(model: nn.Module, inputs: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Eq. 9 written out anew: P of each row, float64."""
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    logs = torch.log_softmax(model(**inputs).logits.double(), -1)
    if labels.ndim == 1:
        return logs.gather(-1, labels[:, None])[:, 0].exp()
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        logs, labels = logs[:, :-1], labels[:, 1:]
    chosen = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != -100)).sum(1).exp()


def scaled_positions(model: nn.Module, batch: Batch, name: str) -> torch.Tensor:
    labels = batch["labels"]
    if model.config.is_encoder_decoder and "decoder" in name.split("."):
        return labels != -100
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], 1)
    return batch["attention_mask"].bool()


def captum_scores(model: nn.Module, batch: Batch, steps: int) -> torch.Tensor:
    """Captum's IntegratedGradients, layer by layer, through a forward pass whose neurons are put in by
    hand."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    found = []
    for layer in find_neurons(model):
        module = model.get_submodule(layer.name)
        inputs_seen: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(
            lambda _, args, inputs_seen=inputs_seen: inputs_seen.append(args[0].detach())
        )
        with torch.no_grad():
            answer_probability(model, inputs, labels)
        hook.remove()
        where = scaled_positions(model, batch, layer.name)[..., None]
        neurons = inputs_seen[0].view(*where.shape[:2], -1)

        def forward(scaled: torch.Tensor, module: nn.Module = module, where: torch.Tensor = where) -> torch.Tensor:
            times = len(scaled) // len(labels)
            mask = where.repeat(times, 1, 1)

            def put(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
                return (torch.where(mask, scaled, args[0].view_as(scaled)).view_as(args[0]),)

            hook = module.register_forward_pre_hook(put)
            try:
                repeated = {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
                return answer_probability(model, repeated, labels.repeat(times, *[1] * (labels.ndim - 1)))
            finally:
                hook.remove()

        scores = IntegratedGradients(forward).attribute(neurons, n_steps=steps, method="riemann_right")
        found.append((scores * where).sum(1))
    return torch.cat(found, 1)
