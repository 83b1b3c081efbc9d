"""`AttributionConfig`: how attribution vectors are computed and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choice(name: str, value: object, choices: tuple[str | bool, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`; True and 1 are different values."""
    if not any(value is each or (isinstance(each, str) and value == each) for each in choices):
        raise ValueError(f"{name}={value!r} is not known. Choose one of: {', '.join(map(str, choices))}.")


def check_fields(config: object, kind: type) -> None:
    """Check the fields that the dataclass `kind` adds to those it inherits: ValueError for a value that is none of a
    `Literal`'s choices, TypeError for one that does not have the type of its hint."""
    hints = get_type_hints(kind)
    for name, written in kind.__annotations__.items():
        value, hint = getattr(config, name), hints[name]
        if get_origin(hint) is Literal:
            check_choice(name, value, get_args(hint))
        elif not fits(value, hint):
            raise TypeError(f"{name}={value!r} is not of the type {written}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a hint; an int is a float too, and a bool neither."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is not None:  # a list, or a dictionary's values
        values = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(fits(each, parts[-1]) for each in values)
    if hint is Any or isinstance(value, bool):
        return hint in (Any, bool)
    return isinstance(value, (int, float) if hint is float else hint)


def setting(default: object, help_text: str) -> Any:
    """A field with a help text for HfArgumentParser."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class AttributionConfig:
    """How attribution vectors are computed (Eq. 8-12), compared (Eq. 13) and turned into psi (Eq. 6).

    Raises:
        ValueError: a value outside of what a field's help lists.
        TypeError: a value of another type.
    """

    steps: int = setting(
        20,
        "m of Eq. 11: the number of points at which the gradient is taken. With quadrature='adaptive' 1/m is the "
        "tolerance.",
    )
    quadrature: Literal["riemann", "gauss_legendre", "adaptive"] = setting(
        "adaptive",
        "'riemann' (the paper's right Riemann sum), 'gauss_legendre', or 'adaptive': for each layer and example as "
        "many points as it takes for the change of P to come out right to a part 1/m.",
    )
    neurons: list[str] | str | None = setting(
        None,
        "The modules whose inputs are the FFN neurons: a regular expression that matches the whole module name, or "
        "a list of name endings. None finds the down projections by structure.",
    )
    stacks: Literal["all", "encoder", "decoder"] = setting(
        "all", "Neurons of an encoder-decoder: 'all', 'encoder' or 'decoder'."
    )
    max_rows: int | None = setting(
        None,
        "Largest number of rows (examples x steps) in one forward pass. None chooses by the free memory.",
    )
    max_answer_tokens: int = setting(
        64, "A longer answer is refused: most often it is a prompt whose labels were not set to -100."
    )
    attribution_model: Literal["auto", "cumulative", "task"] = setting(
        "auto",
        "The model of an earlier task: 'cumulative' (base + adapters 1..t), 'task' (base + adapter t, Eq. 2) or "
        "'auto' (cumulative if the history is in the forward pass during training, else task).",
    )
    aggregation: Literal["per_example", "mean"] = setting(
        "per_example", "'per_example' (the mean of each probe example's w) or 'mean' (w of the mean vectors)."
    )
    absolute: bool = setting(False, "Compare absolute scores instead of signed ones.")
    similarity: Literal["spearman", "pearson", "cosine", "none"] = setting(
        "spearman",
        "'spearman' (Eq. 13), 'pearson', 'cosine', or 'none': w = 0 and psi = 1 (hard orthogonality, as O-LoRA), "
        "and no attribution is computed.",
    )
    granularity: Literal["task", "layer"] = setting(
        "task", "'task' (one w for each earlier task) or 'layer' (one for each earlier task and layer)."
    )
    source: Literal["current", "stored"] = setting(
        "current",
        "'current' (the earlier tasks' models run on the new task's data, Eq. 13) or 'stored' (the attribution "
        "vectors saved with the earlier adapters are compared).",
    )
    clip: bool = setting(False, "Clip psi to [0, 1]. Off: Eq. 6 unchanged, a negative w makes psi larger than 1.")
    refresh: float = setting(
        0.25,
        "When the current task's vector is computed again: a fraction of the run (0.25: four times, 1.0: once), or a "
        "number of optimizer steps (1: each, 50); 0: once. The first time is before the first step. Until the second "
        "the newest earlier task has psi = 1.",
    )
    probe_size: int = setting(
        16,
        "The number of training examples that the vectors are computed on. With 16 the standard error of w is 0.02 "
        "to 0.04; it halves with four times as many.",
    )

    def __post_init__(self) -> None:
        check_fields(self, AttributionConfig)
        for name in ("steps", "probe_size", "max_answer_tokens", "max_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not math.isfinite(self.refresh) or self.refresh < 0 or (self.refresh > 1 and self.refresh % 1):
            raise ValueError(
                f"refresh={self.refresh!r}: give a fraction of the run (0.25: four times), a whole number of "
                "steps (50), or 0 for once at the start."
            )
