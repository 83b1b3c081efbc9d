"""What the answer of a batch is, where it is predicted, and how likely it is (Eq. 9).

A batch has its answer in `labels`; -100 marks what is not the answer. Four kinds of model are told apart:

| kind | labels | answer at position p | neurons are scaled at |
|---|---|---|---|
| causal | (B, L) | labels[p + 1], which p predicts | the positions p |
| seq2seq | (B, T) | labels[p] | decoder: the positions p; encoder: every token |
| token | (B, L) | labels[p] | every token (of a causal backbone: the positions p) |
| sequence | (B,) | the class | every token (of a causal backbone: the position that is pooled) |

Whatever is wrong with a batch is an error here, before any work is done.
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
    """A batch as a model takes it, and where its answer is.

    Attributes:
        inputs: the model's arguments, without labels, on its device.
        labels: as they were given.
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
        """The inputs with these examples, `(R,)`, as the batch; what has no row for each example as it is."""
        return {name: x[rows] if x.ndim and len(x) == len(self) else x for name, x in self.inputs.items()}

    def as_given(self) -> Inputs:
        """Inputs and labels, as `read_batch` takes them."""
        return {**self.inputs, "labels": self.labels}


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
        raise ValueError(
            "The batch has no `labels` tensor, so there is no answer to attribute. Collate it with labels, -100 where "
            "a token is not part of the answer."
        )
    device = _device(model)
    tensors = {name: value.detach().to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    # autograd cannot save what was made under inference_mode
    tensors = {name: value.clone() if value.is_inference() else value for name, value in tensors.items()}
    labels = tensors.pop("labels")
    _refuse_packed(tensors, batch)
    kind = _kind(model, labels)
    _check_ids(model, labels, kind)
    accepted = forward_parameters(model)
    inputs = {name: value for name, value in tensors.items() if name in accepted}
    mask, source = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if source is None:
        raise ValueError(f"The batch has neither input_ids nor inputs_embeds. It has {sorted(batch)}.")
    tokens = torch.ones(source.shape[:2], dtype=torch.bool, device=device)  # what is not padding
    tokens = mask.bool() if mask is not None and mask.ndim == 2 else tokens
    if kind == "sequence":
        if len(labels) != len(tokens):
            raise ValueError(f"The batch has {len(labels)} labels for {len(tokens)} examples.")
        pooled = _pooled(model, inputs, tokens) if is_causal(model) else tokens
        return LabelledBatch(inputs, labels, kind, labels, {"single": pooled})
    if kind == "seq2seq":
        _add_decoder_inputs(model, inputs, labels)
    elif labels.shape != tokens.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and inputs {tuple(tokens.shape)} differ in shape.")
    targets = labels
    if kind == "causal":
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
    labelled = targets != IGNORE
    if not labelled.any():
        raise ValueError(
            "No label of the batch is an answer token: all are -100 (for a causal model, the first label of a row "
            "predicts nothing). Check that truncation did not cut the answers off."
        )
    _refuse(
        ~labelled.any(1),
        "Row {row} has no answer token: all its labels are -100. Leave that example out, or check that truncation did "
        "not cut its answer off.",
    )
    if kind != "seq2seq":
        wrong = (labelled & ~tokens).any(1)
        _refuse(wrong, "Row {row} has labels on padding. Set them to -100, or set attention_mask to 1 there.")
    if kind == "causal":
        _refuse(
            ~((labels == IGNORE) & tokens).any(1),
            "Row {row} has labels on every token, the prompt's included. Set the labels of the prompt to -100 (a "
            "completion-only collator does), so that the answer is what is attributed.",
        )
    _refuse(
        labelled.sum(1) > max_answer_tokens,
        f"Row {{row}} has more answer tokens than max_answer_tokens={max_answer_tokens}. If its prompt is labelled, "
        "mask the prompt with -100; if the answer is that long, raise max_answer_tokens.",
    )
    positions = {"single": labelled if kind != "token" or is_causal(model) else tokens}
    if kind == "seq2seq":
        positions = {"encoder": tokens, "decoder": labelled}
    return LabelledBatch(inputs, labels, kind, targets, positions)


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
            "Labels of a regression or a multi-label task name no single answer, so P(y* given x) is not defined. "
            "Give integer labels: token ids, or one class per example."
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if kind == "sequence" or (kind == "token" and head is None):
        size, what = config.num_labels, "classes"
    else:
        size = head.weight.shape[0] if head is not None else config.get_text_config().vocab_size
        what = "ids in the vocabulary"
    if kind == "sequence":
        _refuse(labels == IGNORE, "The label of row {row} is -100: it has no answer. Leave that example out.")
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= size))
    if wrong.any():
        raise ValueError(
            f"Label {int(labels[wrong][0])} is out of range: {type(model).__name__} has {size} {what}. Check that the "
            "tokenizer (or the label map) belongs to this model."
        )


def _refuse_packed(tensors: Inputs, batch: Mapping[str, Any]) -> None:
    advice = "Collate one example per row, padded (for TRL: packing=False, padding_free=False)."
    present = [name for name in _PACKED_KEYS if batch.get(name) is not None]
    if present:
        raise ValueError(f"The batch is packed or padding-free (it has {', '.join(present)}). {advice}")
    ids, mask = tensors.get("position_ids"), tensors.get("attention_mask")
    if ids is not None and ids.ndim == 2:
        real = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
        restarts = (ids[:, 1:] <= ids[:, :-1]) & real[:, 1:] & real[:, :-1]
        _refuse(
            restarts.any(1), f"position_ids of row {{row}} restart, so several examples are packed in it. {advice}"
        )


def _add_decoder_inputs(model: nn.Module, inputs: Inputs, labels: torch.Tensor) -> None:
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ValueError(
                f"{type(model).__name__} cannot make decoder inputs from labels. Add `decoder_input_ids` to the batch."
            )
        inputs["decoder_input_ids"] = shift(labels)
    decoder = inputs.get("decoder_input_ids", inputs.get("decoder_inputs_embeds"))
    if decoder is not None and decoder.shape[:2] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and decoder inputs {tuple(decoder.shape)} differ in shape.")


def _pooled(model: nn.Module, inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
    """The position that a causal classifier pools, bool `(B, L)`: its last token that is not the padding id."""
    config: Any = model.config
    pad = config.get_text_config().pad_token_id
    places = torch.arange(tokens.shape[1], device=tokens.device)
    if pad is None or "input_ids" not in inputs:
        return (places == places[-1]).expand_as(tokens)
    return places == (places * (inputs["input_ids"] != pad)).argmax(1, keepdim=True)


def _refuse(wrong: torch.Tensor, message: str) -> None:
    """Raise ValueError with the first row that is wrong, if any is; `wrong` is bool `(B,)`."""
    if wrong.any():
        raise ValueError(message.format(row=int(wrong.nonzero()[0])))
