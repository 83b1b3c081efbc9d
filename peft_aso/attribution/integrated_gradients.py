"""Attribution of an answer to the FFN neurons of a transformer, by integrated gradients (Eq. 8-12).

For each layer apart, the neurons at the answer's positions are scaled together from zero to their values, the
other layers following the forward pass, and the gradient of P(y* given x) is summed over the steps:

    Attr(n_i) = n_i * sum_k weight_k * dP/dn_i (factor_k * n),    Eq. 11: factor_k = k/m, weight_k = 1/m

Two ways give the same numbers. The plain way runs the whole model for every layer and step. The fast way
computes the prompt once, runs only the answer, and hands on what lies below the layer (window.py, replay.py);
it is used where the model allows it, after a self-check.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..sharding import gathered
from .answer import MAX_ANSWER_TOKENS, Answer, read_batch
from .findings import Findings
from .memory import RowBudget
from .neurons import NeuronLayer, find_neurons, unwrap
from .packing import alike, of_examples
from .passes import Pass, PlainPass
from .quadrature import Path, path
from .quiet import undisturbed
from .scores import scores_of
from .self_check import compare, copies_prompts, must_copy_prompts, verdict
from .steps import groups, record, sweeps, unscaled_gradients
from .vector import AttributionVector, float64
from .window import CausalWindow, DecoderWindow, FastWayUnsupported, WindowPass, position_convention, telling_examples

logger = logging.getLogger(__name__)

METHODS = ("auto", "fast", "plain")
STACKS = ("all", "encoder", "decoder")

Inputs = dict[str, torch.Tensor]


def integrated_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    steps: int = 20,
    quadrature: str = "riemann",
    neurons: str | Sequence[str] | None = None,
    stacks: str = "all",
    max_rows: int | None = None,
    method: str = "auto",
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    progress: bool = False,
) -> AttributionVector:
    """Integrated gradients of P(y* given x) for every FFN neuron, one row per example (Eq. 8-12).

    The model runs in eval mode and is left as it was found: training flags, random state, gradients, hooks
    and configuration. The caller's autocast applies; probabilities are taken in float32 at least.

    Args:
        model: a transformers model, or a wrapper of one (PEFT, torch.compile, DistributedDataParallel). What
            its adapters are set to is what is attributed.
        batch: a collated batch with `labels`, -100 where there is no answer (see answer.py).
        steps: m of Eq. 11; with "adaptive" 1/m is the tolerance.
        quadrature: "riemann" (the paper's right sum), "gauss_legendre", or "adaptive": for each layer and example as
            few nodes as it takes for the change of P to come out right to a part 1/m (see adaptive.py).
        neurons: None to find down projections by structure, a regular expression for whole module names, or a
            list of suffixes.
        stacks: "all", or only the "encoder" or the "decoder" of an encoder-decoder model.
        max_rows: how many rows (examples x steps x layers) go through the model at once; None chooses by the memory
            that is free (see memory.py). It changes the last digits at most.
        method: "auto" takes the fast way where the self-check passes and falls back with a warning, "fast"
            raises instead of falling back, "plain" runs the whole model for each layer.
        max_answer_tokens: a longer answer is refused: most often a prompt that was not masked.
        progress: show a bar over layers while it runs.

    Returns:
        an `AttributionVector`: values `(batch, N)`, layers in the order of `named_modules()`.

    Raises:
        ValueError: settings or a batch that are wrong (see `read_batch`, `find_neurons`), NaN or Inf in the
            result.
        FastWayUnsupported: only with method "fast".
    """
    rule = path(steps, quadrature)
    _check_settings(method, stacks, max_rows)
    model = unwrap(model)
    layers = _of_stack(model, find_neurons(model, neurons), stacks)
    with gathered(model), undisturbed(model):
        inputs, answer = read_batch(model, batch, max_answer_tokens)
        found = Findings()
        total = len(layers) * len(answer.targets)
        with tqdm(total=total, desc="attribution", unit="layer", leave=False, disable=not progress) as bar:
            for rows, run, part, skip in _plan(model, inputs, answer, layers, method):
                _run_layers(run, part, rule, max_rows, skip, found, rows, bar)
        return found.vector(layers)


def _check_settings(method: str, stacks: str, max_rows: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if stacks not in STACKS:
        raise ValueError(f"stacks is one of {', '.join(STACKS)}, not {stacks!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is at least 1, or None to choose it by memory, not {max_rows!r}")


def _of_stack(model: nn.Module, layers: list[NeuronLayer], stacks: str) -> list[NeuronLayer]:
    if stacks == "all":
        return layers
    chosen = [layer for layer in layers if layer.stack == stacks]
    if not chosen:
        raise ValueError(
            f"stacks={stacks!r}, but {type(model).__name__} has no FFN neurons in such a stack: use stacks='all'"
        )
    return chosen


def _plan(
    model: nn.Module, inputs: Inputs, answer: Answer, layers: list[NeuronLayer], method: str
) -> Iterable[tuple[torch.Tensor, Pass, list[NeuronLayer], bool]]:
    """(examples, their pass, its layers, whether blocks below are skipped), fast where that is possible."""
    everything = torch.arange(len(answer.targets), device=answer.targets.device)
    for stack in dict.fromkeys(layer.stack for layer in layers):
        own = [layer for layer in layers if layer.stack == stack]
        inside = [layer for layer in own if layer.block is not None] if method != "plain" else []
        fast = _fast_pass(model, inputs, answer, inside, method) if inside else None
        for rows, run in fast or ():
            yield rows, run, inside, True
        rest = own if fast is None else [layer for layer in own if layer.block is None]
        if rest:
            outside = any(layer.block is None for layer in rest)
            yield everything, PlainPass(model, inputs, answer, whole=outside), rest, False


def _fast_pass(
    model: nn.Module, inputs: Inputs, answer: Answer, layers: list[NeuronLayer], method: str
) -> list[tuple[torch.Tensor, Pass]] | None:
    """Checked fast passes for layers of one stack, with their examples; None (with a warning) where only the
    plain way is right."""
    stack = layers[0].stack
    try:
        rows, facts = telling_examples(inputs, answer, stack)
        reason = verdict(
            model, f"{answer.kind}, {stack}, {facts}", lambda: _self_check(model, inputs, answer, layers, rows)
        )
        if reason is None:
            parts = alike(answer, stack)
            return [(rows, _make_fast(model, *of_examples(inputs, answer, rows), stack)) for rows in parts]
        if method == "fast":
            raise FastWayUnsupported(f"the fast way did not pass its self-check on {type(model).__name__}: {reason}")
    except FastWayUnsupported as error:
        if method == "fast":
            raise
        warnings.warn(f"attribution of this batch runs the plain way: {error}", stacklevel=4)
    return None


def _make_fast(model: nn.Module, inputs: Inputs, answer: Answer, stack: str, extra_padding: int = 0) -> Pass:
    run: WindowPass
    if answer.kind == "causal":
        convention = position_convention(model, inputs, answer.positions["single"])
        run = CausalWindow(model, inputs, answer, convention, extra_padding)
    elif answer.kind == "seq2seq" and stack == "decoder":
        run = DecoderWindow(model, inputs, answer)
    else:  # an encoder sees everything at once: the whole batch is run, from the scaled block upwards
        return PlainPass(model, inputs, answer, lean=True)
    run.shared = not copies_prompts(model)
    return run


def _self_check(
    model: nn.Module, inputs: Inputs, answer: Answer, layers: list[NeuronLayer], rows: torch.Tensor
) -> str | None:
    few, theirs = of_examples(inputs, answer, rows)
    plain = PlainPass(model, few, theirs)
    fast = _make_fast(model, few, theirs, layers[0].stack, extra_padding=2)
    if isinstance(fast, WindowPass) and fast.shared:
        try:
            if compare(fast, plain, layers) is None:
                return None
        except Exception as error:  # whatever sharing trips over, copies of the prompt for each row do not need it
            logger.info("%s: prompts are copied, not shared: %s", type(model).__name__, error)
        must_copy_prompts(model)
        fast.shared = False
    return compare(fast, plain, layers)


def _run_layers(
    run: Pass,
    layers: list[NeuronLayer],
    rule: Path,
    max_rows: int | None,
    skip: bool,
    found: Findings,
    examples: torch.Tensor,
    bar: tqdm,
) -> None:
    """Add what `layers` score on `examples` to `found`; the bar counts layers of the whole batch."""
    budget = RowBudget.of(run, layers, max_rows)
    for group in groups(run, layers):
        # at the node 1 nothing is scaled, and one pass has the gradients of all layers
        shared = skip and bool(rule.nodes[-1] == 1) and run.batch_size <= budget.rows
        recording = record(run, group, outputs=skip, live=shared)
        unscaled = unscaled_gradients(run, group, recording) if shared else {}
        assert recording.log_probability is not None
        found.add_log_probability(examples, float64(recording.log_probability.detach()))
        each = run.batch_size * max(1, len(rule.nodes) - shared)
        parts = sweeps(group, each, budget) if skip and run.can_sweep else [[layer] for layer in group]
        for part in parts:
            scores = scores_of(run, part, recording, rule, budget.rows, skip, unscaled)
            for layer, score in zip(part, scores, strict=True):
                found.add(examples, layer, score)
            bar.update(len(part) * run.batch_size)
