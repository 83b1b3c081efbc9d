"""Attribution of a model with adapters: which adapters are on while it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from ..attribution import MAX_ANSWER_TOKENS, AttributionVector, integrated_gradients, unwrap
from ..attribution.answer import read_batch
from ..attribution.neurons import find_neurons
from ..attribution.quiet import undisturbed
from ..tuner import ASOLoraModel
from ..tuner.config import AttributionConfig
from ..tuner.persistence import tuner_of


def compute_attribution(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    adapter: str | None = None,
    alone: bool = False,
    steps: int = 20,
    quadrature: str = "riemann",
    neurons: str | Sequence[str] | None = None,
    stacks: str = "all",
    max_rows: int | None = None,
    method: str = "auto",
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    progress: bool = False,
) -> AttributionVector:
    """Integrated gradients of P(y* given x) with respect to every FFN neuron (Eq. 8-12).

    The model is left as it was: active adapters, training mode, gradients, random state.

    Args:
        model: any transformers model, or a PEFT model.
        batch: a collated batch with `labels` (-100 = not the answer), of any padding; moved to the model's device.
        adapter: the name of the adapter whose task's model is looked at: base + its history + the adapter. `None`: as
            it stands.
        alone: base + that adapter only (Eq. 2). Needs `adapter`.
        steps, quadrature, neurons, stacks, max_rows, method, max_answer_tokens, progress: see
            `peft_aso.attribution.integrated_gradients`.

    Returns:
        `AttributionVector`: `.scores` is Eq. 11, float32 `(batch, N)`; `.log_probability` `(batch,)`;
        `.layout` a list of `(module_name, start, stop)`.

    Raises:
        ValueError: no such adapter, `alone` without one, merged adapters; a model without FFN neurons; a batch that is
            refused: no answer tokens, a longer answer than `max_answer_tokens`, labels on the prompt, several examples
            packed into a row.
        FastWayUnsupported: with `method="fast"`, where the model or the batch does not allow it.
        MissingHistoryError: a task of the adapter's history is not loaded.
    """
    with looking_at(model, adapter, alone):
        return integrated_gradients(
            model,
            batch,
            steps=steps,
            quadrature=quadrature,
            neurons=neurons,
            stacks=stacks,
            max_rows=max_rows,
            method=method,
            max_answer_tokens=max_answer_tokens,
            progress=progress,
        )


def check_readable(model: nn.Module, batches: Sequence[Mapping[str, Any]], settings: AttributionConfig) -> None:
    """Raise what `compute_attribution` would say of these batches and settings, without computing anything.

    Args:
        model: a PEFT model with ASO-LoRA adapters.
        batches: collated batches with `labels`.
        settings: those of the task.

    Raises:
        ValueError: a model without FFN neurons, or without any in the settings' `stacks`; a batch that is refused.
    """
    bare, tuner = unwrap(model), tuner_of(model)
    stacks = {layer.stack for layer in find_neurons(bare, settings.neurons)}
    if settings.stacks != "all" and settings.stacks not in stacks:
        raise ValueError(f"{type(bare).__name__} has no FFN neurons in a stack {settings.stacks!r}: use stacks='all'")
    with nullcontext() if tuner is None else tuner.unsharded(), undisturbed(bare):
        for batch in batches:
            read_batch(bare, batch, settings.max_answer_tokens)


def try_attribution(model: nn.Module, batch: Mapping[str, Any], settings: AttributionConfig) -> None:
    """Attribution with one step of the path, to see that the model allows it; what it raises is what is wrong."""
    compute_attribution(
        model, batch, steps=1, neurons=settings.neurons, stacks=settings.stacks, max_rows=settings.max_rows,
        max_answer_tokens=settings.max_answer_tokens,
    )  # fmt: skip


def looking_at(model: nn.Module, adapter: str | None, alone: bool) -> AbstractContextManager[None]:
    """A context in which the model is the one of `adapter`: with its history, or alone (Eq. 2)."""
    tuner = tuner_of(model)
    if adapter is None:
        if alone:
            raise ValueError("alone=True needs to know which adapter: give adapter=<name>.")
        return nullcontext() if tuner is None else _as_one(tuner, nullcontext())
    if tuner is None:
        raise ValueError(
            f"adapter={adapter!r} needs a model with ASO-LoRA adapters (get_peft_model(base, ASOLoraConfig(...))), "
            f"and this is a {type(model).__name__}. Leave adapter out to look at the model as it stands."
        )
    return _as_one(tuner, tuner.only(adapter) if alone else tuner.through(adapter))


@contextmanager
def _as_one(tuner: ASOLoraModel, looking: AbstractContextManager[None]) -> Iterator[None]:
    """`looking`, with each module's adapters in one matrix: the model is run hundreds of times and not trained."""
    with tuner.unsharded(), looking, tuner.as_one():
        yield
