"""What the answer of a batch is, where it is predicted, and how likely it is (Eq. 9).

A batch has its answer in `labels`; -100 marks all other positions. There are four kinds of model:

| kind | labels | answer at position p | neurons are scaled at |
|---|---|---|---|
| causal | (B, L) | labels[p + 1], which p predicts | the positions p |
| seq2seq | (B, T) | labels[p] | decoder: the positions p; encoder: every token |
| token | (B, L) | labels[p] | every token (of a causal backbone: the positions p) |
| sequence | (B,) | the class | every token (of a causal backbone: the position that is pooled) |

A batch that does not fit its model is an error here, before the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

IGNORE = -100
_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k", "seq_idx")

Inputs = dict[str, torch.Tensor]


@dataclass
class LabelledBatch:
    """A model's inputs, and where their answer is.

    Attributes:
        inputs: the model's arguments, without labels, on its device.
        labels: the batch's.
        kind: "causal", "seq2seq", "token" or "sequence" (see the table above).
        targets: int64; `(B, L)` with the id that the logits at each position are to predict, or -100; `(B,)`
            classes for the kind "sequence".
        positions: for each stack ("single", or "encoder" and "decoder"), bool `(B, L of that stack)`: where
            neurons are scaled.
    """

    inputs: Inputs
    labels: torch.Tensor
    kind: str
    targets: torch.Tensor
    positions: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.targets)

    def examples(self, rows: torch.Tensor) -> LabelledBatch:
        """The part with these examples, `(E,)`."""
        rows = rows.to(self.targets.device)
        positions = {stack: mask[rows] for stack, mask in self.positions.items()}
        return LabelledBatch(self.rows(rows), self.labels[rows], self.kind, self.targets[rows], positions)

    def rows(self, rows: torch.Tensor) -> Inputs:
        """The inputs of these examples, `(R,)`; an input without a row for each example stays the same."""
        return {name: x[rows] if x.ndim and len(x) == len(self) else x for name, x in self.inputs.items()}


def read_batch(model: nn.Module, batch: Mapping[str, Any], max_answer_tokens: int = 64) -> LabelledBatch:
    """Check a batch and find its answer.

    Args:
        model: a transformers model without wrappers, in eval mode.
        batch: a collated batch with `labels`, see the module's table.
        max_answer_tokens: more labelled positions than this in one example are refused.

    Raises:
        ValueError: no `labels`; none labelled in the batch or in a row; too many, or all; labels on padding;
            packed sequences; labels that are not class or token ids, or out of range; labels whose shape fits
            no kind.
    """
    if not isinstance(batch.get("labels"), torch.Tensor):
        raise ValueError("The batch has no `labels` tensor. Collate it with labels, -100 outside of the answer.")
    device = _device(model)
    tensors = {name: value.detach().to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    # autograd cannot save what was made under inference_mode
    tensors = {name: value.clone() if value.is_inference() else value for name, value in tensors.items()}
    labels, accepted = tensors.pop("labels"), forward_parameters(model)
    inputs = {name: value for name, value in tensors.items() if name in accepted}
    mask, source = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if source is None:
        raise ValueError(f"The batch has neither input_ids nor inputs_embeds. It has {sorted(batch)}.")
    tokens = torch.ones(source.shape[:2], dtype=torch.bool, device=device)  # what is not padding
    tokens = mask.bool() if mask is not None and mask.ndim == 2 else tokens
    _refuse_packed(batch, inputs.get("position_ids"), tokens)
    kind = _kind(model, labels)
    _check_ids(model, labels, kind)
    if kind == "sequence":
        _check_shape(labels, tokens[:, 0], "examples")
        pooled = _pooled(model, inputs, tokens) if is_causal(model) else tokens
        return LabelledBatch(inputs, labels, kind, labels, {"single": pooled})
    if kind == "seq2seq":
        if not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise ValueError(f"{type(model).__name__} cannot shift labels. Add `decoder_input_ids` to the batch.")
            inputs["decoder_input_ids"] = shift(labels)
        decoder = inputs.get("decoder_input_ids", inputs.get("decoder_inputs_embeds"))
        _check_shape(labels, decoder, "decoder inputs")
    else:
        _check_shape(labels, tokens, "inputs")
    targets = labels
    if kind == "causal":
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
    labelled = targets != IGNORE
    if not labelled.any():
        raise ValueError(
            "No label of the batch is an answer token: all are -100, or first in their row, which nothing predicts. "
            "Check that truncation did not cut the answers off."
        )
    _refuse(~labelled.any(1), "Row {row} has no answer token. Leave it out, or see whether truncation cut it off.")
    if kind != "seq2seq":
        wrong = (labelled & ~tokens).any(1)
        _refuse(wrong, "Row {row} has labels on padding. Set them to -100, or set attention_mask to 1 there.")
    if kind == "causal":
        complete = ~((labels == IGNORE) & tokens).any(1)
        message = "Row {row} has labels on every token. Set the labels of the prompt to -100"
        _refuse(complete, message + " (for chat messages in TRL: assistant_only_loss=True).")
    _refuse(
        labelled.sum(1) > max_answer_tokens,
        f"Row {{row}} has more answer tokens than max_answer_tokens={max_answer_tokens}. Set the labels of its prompt "
        "to -100, or raise max_answer_tokens.",
    )
    if kind == "seq2seq":
        return LabelledBatch(inputs, labels, kind, targets, {"encoder": tokens, "decoder": labelled})
    scaled = tokens if kind == "token" and not is_causal(model) else labelled
    return LabelledBatch(inputs, labels, kind, targets, {"single": scaled})


def log_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log P(y* given x), Eq. 9: the sum of the answer's log-probabilities, softmax in at least float32.

    Args:
        logits: `(R, W, V)` with targets `(R, W)`, or `(R, C)` with targets `(R,)`.
        targets: ids to predict, -100 where there is none.

    Returns:
        `(R,)`, differentiable with respect to the logits.
    """
    targets = targets.to(logits.device)
    labelled = targets != IGNORE
    # the logits are the largest tensor of a pass: no copy of them where every position is labelled
    picked = logits.flatten(0, -2) if bool(labelled.all()) else logits[labelled]
    with torch.autocast(logits.device.type, enabled=False):
        picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
        logs = -cross_entropy(picked, targets[labelled], reduction="none")
    return logs.new_zeros(len(logits)).index_add(0, labelled.nonzero()[:, 0], logs)


def forward_parameters(model: nn.Module) -> set[str]:
    """Names of the arguments that the model's forward takes."""
    return set(inspect.signature(type(model).forward).parameters)


def is_causal(model: nn.Module) -> bool:
    """Whether the first of two tokens is blind to the second, found by running the backbone on two such pairs."""
    backbone: Any = getattr(model, "base_model", model)
    ids = torch.tensor([[5, 6], [5, 7]], device=_device(model))
    with torch.no_grad():
        states = backbone(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 0].float()
    return bool((states[0] - states[1]).abs().max() <= 1e-5 * states.abs().max())


def _device(model: nn.Module) -> torch.device:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return next((embeddings if embeddings is not None else model).parameters()).device


def _kind(model: nn.Module, labels: torch.Tensor) -> str:
    if labels.ndim not in (1, 2):
        raise ValueError(
            f"labels must be (batch, length) token ids or (batch,) classes. Their shape is {tuple(labels.shape)}."
        )
    generates = bool(getattr(model, "can_generate", lambda: False)())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        if labels.ndim == 1 or not generates:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder that does not generate its labels. Use the "
                "ForConditionalGeneration class."
            )
        return "seq2seq"
    if labels.ndim == 1:
        return "sequence"
    return "causal" if generates else "token"


def _check_ids(model: nn.Module, labels: torch.Tensor, kind: str) -> None:
    config: Any = model.config
    regression = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    if labels.is_floating_point() or (kind == "sequence" and (regression or config.num_labels == 1)):
        raise ValueError(
            "Labels of a regression or a multi-label task name no single answer. Give integer labels: token ids, or "
            "one class per example."
        )
    if kind == "sequence":
        _refuse(labels == IGNORE, "The label of row {row} is -100, so it has no answer. Leave that example out.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if kind == "sequence" or (kind == "token" and head is None):
        size, unit = config.num_labels, "classes"
    else:
        size = head.weight.shape[0] if head is not None else config.get_text_config().vocab_size
        unit = "ids in the vocabulary"
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= size))
    if wrong.any():
        raise ValueError(
            f"Label {int(labels[wrong][0])} is out of range: {type(model).__name__} has {size} {unit}. Check that the "
            "tokenizer (or the label map) belongs to this model."
        )


def _check_shape(labels: torch.Tensor, other: Any, name: str) -> None:
    shape = other.shape[: labels.ndim]
    if labels.shape != shape:
        raise ValueError(f"labels {tuple(labels.shape)} and {name} {tuple(shape)} differ in shape.")


def _refuse_packed(batch: Mapping[str, Any], position_ids: torch.Tensor | None, tokens: torch.Tensor) -> None:
    advice = "Collate one example per row, padded (for TRL: packing=False, padding_free=False)."
    present = [name for name in _PACKED_KEYS if batch.get(name) is not None]
    if present:
        raise ValueError(f"The batch is packed or padding-free (it has {', '.join(present)}). {advice}")
    if position_ids is not None and position_ids.shape == tokens.shape:
        restarts = (position_ids[:, 1:] <= position_ids[:, :-1]) & tokens[:, 1:] & tokens[:, :-1]
        message = "position_ids of row {row} restart, so several examples are packed in it. "
        _refuse(restarts.any(1), message + advice)


def _pooled(model: nn.Module, inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
    """The position that a causal classifier pools, bool `(B, L)`: its last token that is not the padding id."""
    config: Any = model.config
    pad = config.get_text_config().pad_token_id
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    if pad is None or "input_ids" not in inputs:
        return (columns == columns[-1]).expand_as(tokens)
    return columns == (columns * (inputs["input_ids"] != pad)).argmax(1, keepdim=True)


def _refuse(wrong: torch.Tensor, message: str) -> None:
    """Raise ValueError with the first row that is wrong, if any is; `wrong` is bool `(B,)`."""
    if wrong.any():
        raise ValueError(message.format(row=int(wrong.nonzero()[0])))
