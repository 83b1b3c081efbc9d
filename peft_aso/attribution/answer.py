"""What the answer of a batch is, where it is predicted, and how likely it is (Eq. 9).

A batch holds its answer in `labels`; -100 marks what is not the answer. Four kinds of model are told apart:

| kind | labels | answer at position p | neurons are scaled at |
|---|---|---|---|
| causal | (B, L) | labels[p + 1], which p predicts | the positions p |
| seq2seq | (B, T) | labels[p] | decoder: the positions p; encoder: every token |
| token | (B, L) | labels[p] | every token (of a causal backbone: the positions p) |
| sequence | (B,) | the class | every token (of a causal backbone: the position that is pooled) |

Everything wrong with a batch is said here, before any work is done.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IGNORE = -100
# An answer of a classification or a question-answering task has a handful of tokens, and a window of
# positions as long as the answer is run steps x layers times: 64 admits every such answer with room, and
# stops the common mistake of leaving the prompt's labels in, before it costs an hour.
MAX_ANSWER_TOKENS = 64

# how many logits are exponentiated at once, 16 MiB in float32
_CHUNK = 2**22

_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class Answer:
    """The answer of a batch.

    Attributes:
        kind: "causal", "seq2seq", "token" or "sequence" (see the table above).
        targets: int64; `(B, L)` with the id that the logits at each position are to predict, or -100; `(B,)`
            classes for the kind "sequence".
        positions: for each stack ("single", or "encoder" and "decoder"), bool `(B, L of that stack)`: where
            neurons are scaled.
    """

    kind: str
    targets: torch.Tensor
    positions: dict[str, torch.Tensor]


def read_batch(
    model: nn.Module, batch: Mapping[str, Any], max_answer_tokens: int = MAX_ANSWER_TOKENS
) -> tuple[dict[str, torch.Tensor], Answer]:
    """The model's inputs (on its device, without labels) and the answer.

    Args:
        model: a transformers model without wrappers.
        batch: a collated batch with `labels`, see the module's table.
        max_answer_tokens: more labelled positions than this in one example are refused.

    Raises:
        ValueError: no `labels`; none labelled in the batch or in a row; too many, or all; labels on padding;
            packed sequences; labels that are not class or token ids, or out of range; labels whose shape fits
            no kind.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            "the batch has no `labels` tensor, so there is no answer to attribute; collate it with labels, "
            "-100 where a token is not part of the answer"
        )
    device = _device(model)
    tensors = {key: _plain(value, device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = tensors.pop("labels")
    _refuse_packed(tensors, batch)
    kind = _kind(model, labels)
    _check_ids(model, labels, kind)
    accepted = forward_parameters(model)
    inputs = {key: value for key, value in tensors.items() if key in accepted}
    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        raise ValueError(f"the batch has neither input_ids nor inputs_embeds; it has {sorted(batch)}")
    readers = {"causal": _causal, "seq2seq": _seq2seq, "token": _token, "sequence": _sequence}
    answer = readers[kind](model, inputs, labels)
    if kind != "sequence":
        _check_amount(answer, labels, max_answer_tokens)
    return inputs, answer


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
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    with torch.autocast(logits.device.type, enabled=False):
        logs: torch.Tensor = _LogSoftmaxAt.apply(picked, targets[labelled])  # type: ignore[no-untyped-call]
    rows = labelled.nonzero()[:, 0]
    return torch.zeros(len(logits), dtype=logs.dtype, device=logs.device).index_add(0, rows, logs)


class _LogSoftmaxAt(torch.autograd.Function):
    """`log_softmax(logits)[m, targets[m]]` for `(M, V)` logits, with one tensor of that size, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        some = max(1, _CHUNK // logits.shape[1])
        sums = torch.cat([part.logsumexp(-1) for part in logits.split(some)])
        ctx.save_for_backward(logits, sums, targets)
        return logits.gather(1, targets[:, None])[:, 0] - sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, sums, targets = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.sub(logits, sums[:, None]).exp_().mul_(-gradient[:, None])
        return result.scatter_add_(1, targets[:, None], gradient[:, None]), None


def forward_parameters(model: nn.Module) -> set[str]:
    """Names of the arguments that the model's forward takes."""
    return set(inspect.signature(type(model).forward).parameters)


def _device(model: nn.Module) -> torch.device:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    parameter = next((embeddings if embeddings is not None else model).parameters())
    return parameter.device


def _plain(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor that autograd can save: one made under inference_mode has to be copied."""
    tensor = tensor.detach().to(device)
    return tensor.clone() if tensor.is_inference() else tensor


def _kind(model: nn.Module, labels: torch.Tensor) -> str:
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if labels.ndim not in (1, 2):
        raise ValueError(
            f"labels must be (batch, length) token ids or (batch,) classes, got shape {tuple(labels.shape)}"
        )
    generates = bool(getattr(model, "can_generate", lambda: False)())
    if encoder_decoder:
        if labels.ndim == 1 or not generates:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder without a language-modelling head over its "
                "labels; attribution knows encoder-decoders that generate the answer: use the "
                "ForConditionalGeneration class"
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
            "labels of a regression or a multi-label task name no single answer, so P(y* given x) is not "
            "defined; give integer labels: token ids, or one class per example"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if kind == "sequence" or (kind == "token" and head is None):
        size, what = config.num_labels, "classes"
    else:
        size = head.weight.shape[0] if head is not None else config.get_text_config().vocab_size
        what = "ids in the vocabulary"
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= size))
    if kind == "sequence" and (labels == IGNORE).any():
        row = int((labels == IGNORE).nonzero()[0])
        raise ValueError(f"the label of row {row} is -100: it has no answer; leave that example out")
    if wrong.any():
        raise ValueError(
            f"label {int(labels[wrong][0])} is out of range: {type(model).__name__} has {size} {what}; check "
            "that the tokenizer (or the label map) belongs to this model"
        )


def _refuse_packed(tensors: dict[str, torch.Tensor], batch: Mapping[str, Any]) -> None:
    advice = "collate one example per row, padded (for TRL: packing=False, padding_free=False)"
    present = [key for key in _PACKED_KEYS if batch.get(key) is not None]
    if present:
        raise ValueError(f"the batch is packed or padding-free (it has {', '.join(present)}): {advice}")
    positions = tensors.get("position_ids")
    if positions is None or positions.ndim != 2:
        return
    mask = tensors.get("attention_mask")
    real = torch.ones_like(positions, dtype=torch.bool)
    if mask is not None and mask.shape == positions.shape:
        real = mask.bool()
    restarts = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    if restarts.any():
        row = int(restarts.any(1).nonzero()[0])
        raise ValueError(f"position_ids of row {row} restart, so several examples are packed in it: {advice}")


def _tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool `(B, L)`: what is not padding."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask.bool()
    source = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    return torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)


def _causal(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Answer:
    tokens = _tokens(inputs)
    _check_shape(labels, tokens)
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    positions = targets != IGNORE
    _check_rows(positions)
    _check_padding(positions, tokens)
    full = ((labels == IGNORE) & tokens).sum(1) == 0
    if full.any():
        row = int(full.nonzero()[0])
        raise ValueError(
            f"row {row} has labels on every token, the prompt's included: set the labels of the prompt to "
            "-100 (a completion-only collator does), so that the answer is what is attributed"
        )
    return Answer("causal", targets, {"single": positions})


def _seq2seq(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Answer:
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ValueError(
                f"{type(model).__name__} cannot make decoder inputs from labels: add `decoder_input_ids` to the batch"
            )
        inputs["decoder_input_ids"] = shift(labels)
    decoder = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["decoder_inputs_embeds"]
    if decoder.shape[:2] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and decoder inputs {tuple(decoder.shape[:2])} differ in shape")
    positions = labels != IGNORE
    _check_rows(positions)
    return Answer("seq2seq", labels, {"encoder": _tokens(inputs), "decoder": positions})


def _token(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Answer:
    tokens = _tokens(inputs)
    _check_shape(labels, tokens)
    labelled = labels != IGNORE
    _check_rows(labelled)
    _check_padding(labelled, tokens)
    return Answer("token", labels, {"single": labelled if is_causal(model) else tokens})


def _sequence(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Answer:
    tokens = _tokens(inputs)
    if len(labels) != len(tokens):
        raise ValueError(f"{len(labels)} labels for {len(tokens)} examples")
    if not is_causal(model):
        return Answer("sequence", labels, {"single": tokens})
    positions = torch.zeros_like(tokens)
    positions[torch.arange(len(tokens), device=tokens.device), _pooled(model, inputs, tokens)] = True
    return Answer("sequence", labels, {"single": positions})


def _pooled(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The position that a causal classifier pools, `(B,)`: its last token that is not the padding id."""
    config: Any = model.config
    pad = config.get_text_config().pad_token_id
    last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    if pad is None or "input_ids" not in inputs:
        return last
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (places * (inputs["input_ids"] != pad)).argmax(-1)


def is_causal(model: nn.Module) -> bool:
    """Whether the first of two tokens is blind to the second, found by running the backbone on two such
    pairs."""
    backbone: Any = getattr(model, "base_model", model)
    device = _device(model)
    ids = torch.tensor([[5, 6], [5, 7]], device=device)
    with torch.no_grad():
        states = backbone(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 0].float()
    gap = (states[0] - states[1]).abs().max()
    return bool(gap <= 1e-5 * states.abs().max())


def _check_shape(labels: torch.Tensor, tokens: torch.Tensor) -> None:
    if labels.shape != tokens.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and inputs {tuple(tokens.shape)} differ in shape")


def _check_rows(labelled: torch.Tensor) -> None:
    empty = ~labelled.any(1)
    if empty.all():
        raise ValueError(
            "no label of the batch is an answer token: all are -100 (for a causal model, the first label of "
            "a row predicts nothing). Check that truncation did not cut the answers off"
        )
    if empty.any():
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has no answer token: all its labels are -100. Leave that example "
            "out, or check that truncation did not cut its answer off"
        )


def _check_padding(labelled: torch.Tensor, tokens: torch.Tensor) -> None:
    wrong = (labelled & ~tokens).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"row {row} has labels on padding: set them to -100, or set attention_mask to 1 there")


def _check_amount(answer: Answer, labels: torch.Tensor, most: int) -> None:
    counts = (answer.targets != IGNORE).sum(1)
    if (counts > most).any():
        row = int((counts > most).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(counts[row])} answer tokens, more than max_answer_tokens={most}: if its "
            "prompt is labelled, mask the prompt with -100; if the answer is that long, raise "
            "max_answer_tokens"
        )
