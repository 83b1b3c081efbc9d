"""Attention of many rows to a few prompts, with each prompt's keys and values read in place.

The rows of a window pass repeat a handful of examples hundreds of times. A cache that answers with one copy of the
prompt a row moves far more memory than the attention has work to do, forwards and backwards. Here the model is
handed its own new keys and values only, and an attention function of ours, put into transformers' registry under
a name, adds the prompt: one matrix product for all rows of an example.

A cache layer offers the prompt when the model updates it, and the attention that follows takes the offer. An offer
that is not taken (a model whose attention does not go through the registry) is an error, never a wrong result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "peft_aso_shared_prompt"


class SharingUnsupported(RuntimeError):
    """This model's attention cannot be handed prompts to share; copies can."""


@dataclass(frozen=True)
class RowPlan:
    """Which example each row is: the examples `which`, each `each` times, all that `times` times.

    A sweep over three layers with two steps of two examples has the rows 0 0 1 1, 0 0 1 1, 0 0 1 1.
    """

    which: tuple[int, ...]
    each: int
    times: int

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.which)

    @staticmethod
    def of(rows: torch.Tensor) -> RowPlan:
        """The plan that `rows` `(R,)` follow.

        Raises:
            SharingUnsupported: they follow none.
        """
        listed = rows.tolist()
        first = listed[0]
        each = next((i for i, row in enumerate(listed) if row != first), len(listed))
        period = next((i for i in range(each, len(listed)) if listed[i] == first), len(listed))
        plan = RowPlan(tuple(listed[:period:each]), each, len(listed) // period)
        one = [example for example in plan.which for _ in range(each)]
        if one * plan.times != listed or len(set(plan.which)) < plan.examples:
            raise SharingUnsupported("the rows of this pass do not repeat whole examples")
        return plan

    def shown(self, count: int | None) -> RowPlan:
        """The plan of the first `count` rows, a whole number of repetitions."""
        if count is None:
            return self
        if self.examples == 1:
            return RowPlan(self.which, count, 1)
        return RowPlan(self.which, self.each, count // (self.examples * self.each))

    def of_examples(self, states: torch.Tensor) -> torch.Tensor:
        """The part of `states` `(B, ...)` that belongs to the plan's examples; neighbours are read in place."""
        first, last = self.which[0], self.which[-1]
        if self.which == tuple(range(first, last + 1)):
            return states[first : last + 1]
        return states[list(self.which)]

    def grouped(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """`(R, heads * g, W, d)` as `(E, heads, n, g, W, d)`: the n rows of an example side by side."""
        _, many, width, size = states.shape
        split = states.view(self.times, self.examples, self.each, heads, many // heads, width, size)
        return split.permute(1, 3, 0, 2, 4, 5, 6).reshape(self.examples, heads, -1, many // heads, width, size)

    def ungrouped(self, states: torch.Tensor) -> torch.Tensor:
        """`(E, heads, n, g, W, d)` back as `(R, W, heads * g, d)`, the layout of an attention's output."""
        _, heads, _, group, width, size = states.shape
        split = states.view(self.examples, heads, self.times, self.each, group, width, size)
        return split.permute(2, 0, 3, 5, 1, 4, 6).reshape(-1, width, heads * group, size)


@dataclass(frozen=True)
class Prompt:
    """Keys and values that the rows of `plan` share, `(E, heads, P, d)`; `whole`: they have no others."""

    keys: torch.Tensor
    values: torch.Tensor
    plan: RowPlan
    whole: bool


class Handover:
    """From the cache, which knows the prompt, to the attention that follows."""

    def __init__(self) -> None:
        self._offered: Prompt | None = None

    def offer(self, prompt: Prompt) -> None:
        """Called by the cache."""
        self.check()
        self._offered = prompt

    def take(self) -> Prompt | None:
        """Called by the attention."""
        prompt, self._offered = self._offered, None
        return prompt

    def check(self) -> None:
        """Raise `SharingUnsupported` if the last offer was not taken."""
        if self._offered is not None:
            raise SharingUnsupported("an attention of this model does not go through transformers' registry")


_current: ContextVar[Handover | None] = ContextVar("handover", default=None)


@contextmanager
def sharing(model: nn.Module, handover: Handover) -> Iterator[None]:
    """Inside, the model's attention is ours and takes its prompts from `handover`. Every offer must be taken."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    held = [(config, config._attn_implementation_internal) for config in configs.values()]
    token = _current.set(handover)
    try:
        for config, _ in held:
            config._attn_implementation_internal = NAME
        yield
        handover.check()
    finally:
        _current.reset(token)
        for config, name in held:
            config._attn_implementation_internal = name


def shared_prompt_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `(R, H, W, d)` queries, the answer as `(R, W, H, d)`.

    Without a prompt on offer it is transformers' own sdpa.

    Raises:
        SharingUnsupported: an attention with a term that is not known here (a softcap, sinks), or with shapes
            other than the cache's.
    """
    handover = _current.get()
    prompt = handover.take() if handover is not None else None
    if prompt is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs,
        )  # fmt: skip
        return found
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise SharingUnsupported("an attention with dropout, softcap or sinks")
    plan, heads = prompt.plan, prompt.keys.shape[1]
    if query.shape[1] % heads or (not prompt.whole and key.shape[1::2] != prompt.keys.shape[1::2]):
        raise SharingUnsupported(f"keys of shape {tuple(key.shape)} beside a prompt of {tuple(prompt.keys.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = plan.grouped(query, heads)
    own = (None, None) if prompt.whole else tuple(plan.grouped(x, heads).squeeze(3) for x in (key * scale, value))
    length = prompt.keys.shape[2]
    bias = _bias(module, plan, queries, attention_mask, position_bias, length, 0 if prompt.whole else key.shape[2])
    split = (None, None) if bias is None else (bias[..., :length], None if prompt.whole else bias[..., length:])
    tensors = (queries, prompt.keys * scale, prompt.values, *own, *split)
    attended = _Attend.apply(*tensors)  # type: ignore[no-untyped-call]
    return plan.ungrouped(attended), None


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _bias(
    module: nn.Module,
    plan: RowPlan,
    queries: torch.Tensor,
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    prompt: int,
    own: int,
) -> torch.Tensor | None:
    """What is added to the scores, float32 `(E or 1, heads or 1, 1, g or 1, W, P + own)`; None for nothing.

    Rows of one example have one mask: the first row's is taken.
    """
    _, heads, _, group, width, _ = queries.shape
    if mask is None and own > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(1, 1, width, prompt + own, dtype=torch.bool, device=queries.device).tril(prompt)
    terms = []
    if mask is not None:
        if mask.dtype == torch.bool:
            lowest = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
        terms.append(mask)
    if position_bias is not None:
        terms.append(position_bias)
    total = None
    for term in terms:
        if term.shape[-2:] != (width, prompt + own):
            raise SharingUnsupported(f"a mask or bias of shape {tuple(term.shape)} beside {prompt + own} keys")
        rows = len(term)
        if rows > 1:
            term = term[:: plan.each][: plan.examples]
        by_head = term.shape[1] > 1
        shape = (len(term), heads if by_head else 1, 1, group if by_head else 1, width, prompt + own)
        part = term.detach().float().reshape(shape)
        total = part if total is None else total + part
    return total


class _Attend(torch.autograd.Function):
    """softmax([q kp^T + bias_p, q k^T + bias_k]) [vp, v] with a gradient to q, k and v, not to the prompt.

    q `(E, heads, n, g, W, d)`, prompt keys and values `(E, heads, P, d)`, own ones `(E, heads, n, W, d)` or None. The
    softmax is in float32 at least, as in transformers' own attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        prompt_k: torch.Tensor,
        prompt_v: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        bias_p: torch.Tensor | None,
        bias_k: torch.Tensor | None,
    ) -> torch.Tensor:
        examples, heads, n, group, width, size = q.shape
        to_prompt = _wide(q.reshape(examples, heads, -1, size) @ prompt_k.transpose(-1, -2))
        to_prompt = to_prompt.view(examples, heads, n, group, width, -1)
        if bias_p is not None:
            to_prompt.add_(bias_p)
        top = to_prompt.amax(-1, keepdim=True)
        to_own = None
        if k is not None:
            to_own = _wide(q.reshape(examples, heads, n, -1, size) @ k.transpose(-1, -2))
            to_own = to_own.view(examples, heads, n, group, width, width)
            if bias_k is not None:
                to_own.add_(bias_k)
            top = torch.maximum(top, to_own.amax(-1, keepdim=True))
            to_own.sub_(top).exp_()
        total = to_prompt.sub_(top).exp_().sum(-1, keepdim=True)
        if to_own is not None:
            total = total + to_own.sum(-1, keepdim=True)
            to_own = to_own.div_(total).to(q.dtype)
        to_prompt = to_prompt.div_(total).to(q.dtype)
        result = (to_prompt.view(examples, heads, -1, to_prompt.shape[-1]) @ prompt_v).view(q.shape)
        if to_own is not None and v is not None:
            result = result + (to_own.view(examples, heads, n, -1, width) @ v).view(q.shape)
        ctx.save_for_backward(q, prompt_k, prompt_v, k, v, to_prompt, to_own, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, prompt_k, prompt_v, k, v, to_prompt, to_own, result = ctx.saved_tensors
        examples, heads, n, _, width, size = q.shape
        gradient = gradients[0].contiguous()
        mean = (_wide(gradient) * _wide(result)).sum(-1, keepdim=True)
        scores = _wide(gradient.view(examples, heads, -1, size) @ prompt_v.transpose(-1, -2)).view(to_prompt.shape)
        scores = scores.sub_(mean).mul_(to_prompt).to(q.dtype)
        for_q = (scores.view(examples, heads, -1, scores.shape[-1]) @ prompt_k).view(q.shape)
        if k is None:
            return for_q, None, None, None, None, None, None
        rows = gradient.view(examples, heads, n, -1, size)
        for_v = to_own.view(examples, heads, n, -1, width).transpose(-1, -2) @ rows
        scores = _wide(rows @ v.transpose(-1, -2)).view(to_own.shape).sub_(mean).mul_(to_own).to(q.dtype)
        scores = scores.view(examples, heads, n, -1, width)
        for_k = scores.transpose(-1, -2) @ q.reshape(examples, heads, n, -1, size)
        return for_q + (scores @ k).view(q.shape), None, None, for_k, for_v, None, None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
