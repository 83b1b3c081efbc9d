"""What the tests compare with: Eq. 9 written out anew, and how far two sets of scores are apart."""

from __future__ import annotations

import torch
from torch import nn

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
