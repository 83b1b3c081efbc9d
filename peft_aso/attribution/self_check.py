"""Trust, but check: the fast way is compared with the plain one once a model, on a small piece of real work.

The fast way rests on what a transformer usually is: causal, with a cache, blocks in a row. A model that is
something else gives another result, not an error. So before the first use, one or two examples, three layers and two
steps are computed both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from .neurons import NeuronLayer
from .passes import Pass
from .quadrature import path
from .scores import scores_of
from .steps import LayerScores, record
from .window import FastWayUnsupported

# what was found for a model: the situations checked, and why it runs the plain way, if it does
_checked: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_plain_only: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
# models whose attention cannot share a prompt between rows (shared_attention.py)
_copying: WeakSet[nn.Module] = WeakSet()

TOLERANCE = 1e-3
# bfloat16 has eight bits: the two ways sum in another order and differ in the third digit
HALF_TOLERANCE = 1e-1


def verdict(model: nn.Module, situation: str, check: Callable[[], str | None]) -> str | None:
    """Why `model` must run the plain way, or None. Runs `check` the first time that a situation comes up.

    Args:
        situation: a word for what may matter to the outcome ("padded left", ...).
        check: answers None for agreement, or says what differs; an exception counts as a difference.

    Raises:
        FastWayUnsupported: passed on from `check`, and not remembered: it is about one batch.
    """
    if model in _plain_only:
        return _plain_only[model]
    known = _checked.setdefault(model, set())
    if situation in known:
        return None
    try:
        reason = check()
    except FastWayUnsupported:
        raise
    except Exception as error:  # whatever the fast way trips over, the plain way does not need it
        reason = f"it raised {type(error).__name__}: {error}"
    if reason is None:
        known.add(situation)
    else:
        _plain_only[model] = reason
        warnings.warn(
            f"attribution of {type(model).__name__} runs the plain way, which is exact but slow, because the "
            f"fast way did not pass its self-check: {reason}",
            stacklevel=4,
        )
    return reason


def copies_prompts(model: nn.Module) -> bool:
    """Whether each row of a window pass needs its own copy of the prompt's keys and values."""
    return model in _copying


def must_copy_prompts(model: nn.Module) -> None:
    """Remember that sharing does not work on `model`."""
    _copying.add(model)


def compare(fast: Pass, plain: Pass, layers: list[NeuronLayer]) -> str | None:
    """What differs between two passes over the same examples, or None: first, middle and last layer, two
    steps."""
    chosen = _three(layers)
    fast_scores, half = _scores(fast, chosen, skip=True)
    plain_scores, _ = _scores(plain, chosen, skip=False)
    for layer, ours, reference in zip(chosen, fast_scores, plain_scores, strict=True):
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        common = torch.maximum(ours.log_size, reference.log_size)
        first = ours.values * torch.exp(ours.log_size - common)[:, None]
        second = reference.values * torch.exp(reference.log_size - common)[:, None]
        gap, largest = float((first - second).abs().max()), float(second.abs().max())
        if not gap <= tolerance * max(largest, torch.finfo(torch.float64).tiny):
            return (
                f"scores of {layer.name} differ by {gap / max(largest, 1e-300):.1e} of the largest one "
                f"({tolerance:.0e} is allowed)"
            )
    return None


def _scores(run: Pass, layers: list[NeuronLayer], skip: bool) -> tuple[list[LayerScores], bool]:
    """Scores with two steps, as they are computed for all layers; and whether neurons are in half precision."""
    recording = record(run, layers, outputs=skip)
    half = any(torch.finfo(neurons.dtype).bits < 32 for neurons in recording.neurons.values())
    if skip and run.can_sweep and len(layers) > 1:
        return scores_of(run, layers, recording, path(2), max_rows=2, skip=skip), half
    each = (scores_of(run, [layer], recording, path(2), max_rows=2, skip=skip) for layer in layers)
    return [score for scores in each for score in scores], half


def _three(layers: list[NeuronLayer]) -> list[NeuronLayer]:
    indices = sorted({0, len(layers) // 2, len(layers) - 1})
    return [layers[index] for index in indices]
