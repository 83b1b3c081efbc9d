"""The fast way to run a causal model or a decoder: the prompt once, then only the answer's window, many rows
at once.

Neurons at the positions that predict an answer cannot change anything before them in a causal model, so the
prompt's keys and values (and the encoder's, for a cross-attention) are the same in every step: they are
computed once. What is run again is the window from the first to the last position that predicts an answer
token.

Examples of a causal batch have prompts and answers of different lengths. The batch is laid out anew, so that
the windows of all rows start in one column:

    given:   p p p a a .        laid out:   p p p | a a
             p a . . . .                    . . p | a .

Positions are passed explicitly, equal to those that the model would have used on the batch as given.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from .answer import IGNORE, Answer, forward_parameters, log_probability
from .passes import Pass, forward_options, keep_labelled, vocabulary
from .prompt_cache import empty_prompt, floats_per_row, keys_per_row, read_only, writable
from .replay import take
from .shared_attention import Handover, sharing

# how a model numbers tokens does not change while it lives
_conventions: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class FastWayUnsupported(ValueError):
    """This batch, or this model, cannot be run the fast way; the plain way can."""


class WindowPass(Pass):
    """Rows of answer windows over cached prompts.

    Subclasses say what the prompt and the window are: `window` are the model's arguments for the window with
    the batch in the first dimension, `cache` the prompt's keys and values.
    """

    can_sweep = True
    shared = False  # whether rows share the prompt's keys and values (shared_attention.py), or have copies

    window: dict[str, Any]
    cache: Cache
    targets: torch.Tensor
    options: dict[str, Any]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = take(self.window, rows, self.batch_size)
        if self.shared:
            handover = Handover()
            cache = read_only(self.cache, rows, handover)
            with sharing(self.model, handover):
                logits = self._call(cache, **inputs)
        else:
            logits = self._call(read_only(self.cache, rows), **inputs)
        return log_probability(logits, self.targets[rows])

    def _call(self, cache: Cache, **inputs: Any) -> torch.Tensor:
        return self.model(**inputs, **self.options, past_key_values=cache, use_cache=True).logits

    def floats_per_row(self) -> int:
        logits = 3 * self.targets[0].numel() * vocabulary(self.model)
        if not self.shared:
            return logits + floats_per_row(self.cache)
        # of the prompt, a row has only the attention's scores
        config: Any = self.model.config
        heads = int(getattr(config.get_text_config(), "num_attention_heads", None) or 16)
        width = max(mask.shape[1] for mask in self.positions.values())
        return logits + 2 * heads * width * keys_per_row(self.cache)


class CausalWindow(WindowPass):
    """A decoder-only model. Runs the prompts when it is made.

    Args:
        inputs, answer: of `read_batch`.
        positions_by: "column" or "rank", see `position_convention`; decides position_ids if the batch has
            none.
        extra_padding: columns of padding in front of every prompt, for the self-check: a model that counts
            columns where it should read position_ids gives itself away.

    Raises:
        FastWayUnsupported: attention masks with holes or with four dimensions, inputs that are not one per
        token.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        answer: Answer,
        positions_by: str = "column",
        extra_padding: int = 0,
    ) -> None:
        self.model, self.batch_size = model, len(answer.targets)
        chosen = answer.positions["single"]
        tokens = _real_tokens(inputs, chosen)
        width = chosen.shape[1]
        places = torch.arange(width, device=chosen.device).expand_as(chosen)
        first, start = _first(tokens), _first(chosen)
        end = width - _first(chosen.flip(1))  # one past the last position
        before = max(int((start - first).max()), 0)
        before += extra_padding if before else 0
        prompt = start[:, None] - before + torch.arange(before, device=chosen.device)
        window = start[:, None] + torch.arange(int((end - start).max()), device=chosen.device)
        prompt_real, window_real = prompt >= first[:, None], window < end[:, None]
        columns = torch.cat([prompt, window], 1).clamp(0, width - 1)
        mask = torch.cat([prompt_real, window_real], 1)
        laid = {name: _gather(name, tensor, columns) for name, tensor in inputs.items() if name != "attention_mask"}
        if "position_ids" not in laid and "position_ids" in forward_parameters(model):
            ids = places if positions_by == "column" else (tokens.cumsum(1) - 1).clamp(min=0)
            laid["position_ids"] = ids.gather(1, columns)
        self.positions = {"single": chosen.gather(1, window.clamp(max=width - 1)) & window_real}
        targets = answer.targets.gather(1, window.clamp(max=width - 1)).masked_fill(~window_real, IGNORE)
        self.targets, self.options = keep_labelled(model, targets, forward_options())
        self._prompt = {name: tensor[:, :before] for name, tensor in laid.items()}
        self._prompt["attention_mask"] = mask[:, :before].long()
        self.window = {name: tensor[:, before:] for name, tensor in laid.items()}
        self.window["attention_mask"] = mask.long()
        self.cache = self._run_prompt(before)

    def _run_prompt(self, length: int) -> Cache:
        if length == 0:
            return empty_prompt(encoder_decoder=False)
        cache = writable(encoder_decoder=False)
        options: dict[str, Any] = forward_options()
        if "logits_to_keep" in self.options:
            options["logits_to_keep"] = 1
        with torch.no_grad():
            self.model(**self._prompt, **options, past_key_values=cache, use_cache=True)
        if cache.get_seq_length() != length:
            raise FastWayUnsupported(f"{type(self.model).__name__} did not fill the cache that it was given")
        return cache


class DecoderWindow(WindowPass):
    """The decoder of an encoder-decoder. Runs the encoder when it is made, and the decoder on the labels
    before any answer (mostly none: answers start in the first column, and share one window)."""

    def __init__(self, model: nn.Module, inputs: dict[str, torch.Tensor], answer: Answer) -> None:
        self.model, self.batch_size = model, len(answer.targets)
        chosen = answer.positions["decoder"]
        columns = chosen.any(0).nonzero()[:, 0]
        start, end = int(columns[0]), int(columns[-1]) + 1
        self.positions = {"decoder": chosen[:, start:end]}
        self.targets, self.options = keep_labelled(model, answer.targets[:, start:end], forward_options())
        sides: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        for name, tensor in inputs.items():
            sides[name.startswith("decoder_")][name] = tensor
        shared = self._encode(sides[False])
        mask = sides[True].pop("decoder_attention_mask", None)
        self.window = {**shared, **{name: tensor[:, start:end] for name, tensor in sides[True].items()}}
        prompt = {**shared, **{name: tensor[:, :start] for name, tensor in sides[True].items()}}
        if mask is not None:
            self.window["decoder_attention_mask"] = mask[:, :end]
            prompt["decoder_attention_mask"] = mask[:, :start]
        with torch.no_grad():
            if start > 0:
                self.cache = writable(encoder_decoder=True)
                self.model(**prompt, **forward_options(), past_key_values=self.cache, use_cache=True)
            else:
                # a cache without a past: one pass over the window fills the cross-attention's part of it
                self.cache = empty_prompt(encoder_decoder=True)
                self._call(self.cache, **self.window)

    def _encode(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        accepted = forward_parameters(encoder)
        foreign = [name for name in inputs if name not in accepted]
        if foreign:
            raise FastWayUnsupported(f"the encoder of {type(self.model).__name__} does not take {', '.join(foreign)}")
        with torch.no_grad():
            states = encoder(**inputs, return_dict=True)
        kept = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        return {**kept, "encoder_outputs": BaseModelOutput(last_hidden_state=states[0])}


def position_convention(model: nn.Module, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> str:
    """How a causal model numbers the tokens of a batch without position_ids: "column", or "rank" among real
    tokens.

    They differ where padding is on the left (Llama counts columns, OPT counts tokens). One short row with
    padding, cut from the batch, is run with neither, and then with each.

    Raises:
        FastWayUnsupported: the model numbers in a third way.
    """
    tokens = _real_tokens(inputs, positions)
    row = int(_first(tokens).argmax())
    first = int(_first(tokens)[row])
    if first == 0 or "position_ids" in inputs or "position_ids" not in forward_parameters(model):
        return "column"
    if model not in _conventions:
        _conventions[model] = _observed_convention(model, inputs, tokens, row, first)
    return _conventions[model]


def _observed_convention(
    model: nn.Module, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, row: int, first: int
) -> str:
    cut = slice(max(first - 2, 0), first + 4)
    short = {name: tensor[row : row + 1, cut] for name, tensor in inputs.items()}
    real = tokens[row : row + 1, cut]
    candidates = {
        "column": torch.arange(real.shape[1], device=real.device)[None],
        "rank": (real.cumsum(1) - 1).clamp(min=0),
    }
    with torch.no_grad():
        own = model(**short, return_dict=True).logits[real].float()
        for name, ids in candidates.items():
            told = model(**short, position_ids=ids, return_dict=True).logits[real].float()
            if torch.allclose(told, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
                return name
    raise FastWayUnsupported(f"{type(model).__name__} numbers padded tokens neither by column nor by rank")


def telling_examples(inputs: dict[str, torch.Tensor], answer: Answer, stack: str) -> tuple[torch.Tensor, str]:
    """One or two examples of a batch that show whether the fast way is right for all, and what they are.

    The one with the longest prompt, since an example without a prompt reads nothing from a cache; and one with padding
    on the left, if there is any.

    Raises:
        FastWayUnsupported: attention masks with holes or with four dimensions.
    """
    chosen, mask = answer.positions[stack], inputs.get("attention_mask")
    lengths = torch.zeros(len(chosen), dtype=torch.long, device=chosen.device)
    if answer.kind == "causal":
        lengths = _first(chosen) - _first(_real_tokens(inputs, chosen))
    elif stack == "decoder":
        lengths = _first(chosen)
    rows = {int(lengths.argmax())}
    padded = mask is not None and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
    if mask is not None and padded:
        rows.add(int(lengths.masked_fill(mask[:, 0] != 0, -len(chosen) * chosen.shape[1]).argmax()))
    facts = f"padded left: {padded}, prompt: {bool((lengths > 0).any())}"
    return torch.tensor(sorted(rows), device=chosen.device), facts


def _real_tokens(inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(positions)
    if mask.shape != positions.shape:
        raise FastWayUnsupported(f"an attention mask of shape {tuple(mask.shape)} cannot be laid out anew")
    tokens = mask.bool()
    span = tokens.shape[1] - _first(tokens) - _first(tokens.flip(1))
    if (tokens.sum(1) != span).any():
        raise FastWayUnsupported("an attention mask with holes between tokens cannot be laid out anew")
    return tokens


def _first(mask: torch.Tensor) -> torch.Tensor:
    """Column of the first True in each row."""
    return mask.long().argmax(1)


def _gather(name: str, tensor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if tensor.ndim < 2 or tensor.shape[0] != columns.shape[0]:
        raise FastWayUnsupported(f"{name} of shape {tuple(tensor.shape)} is not one entry per token")
    index = columns.reshape(*columns.shape, *([1] * (tensor.ndim - 2))).expand(*columns.shape, *tensor.shape[2:])
    return tensor.gather(1, index)
