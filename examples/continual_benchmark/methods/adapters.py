"""One adapter a task, earlier ones frozen: ASO-LoRA, O-LoRA and IncLoRA, which are one code path of peft_aso."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import get_peft_model
from tasks import Task

from peft_aso import MERGES, ASOLoraConfig, ASOTrainer, AttributionConfig, load_chain, save_chain

from .base import Method

_STARTS: dict[str, Any] = {"default": False, "projected": True, "inputs_hard": "inputs"}


@dataclass(frozen=True)
class IncSettings:
    """What all three have."""

    init: Literal["default", "projected", "inputs_hard", "contrast", "inflora"] = field(
        default="default",
        metadata={
            "help": "How A starts: as PEFT has it; that projected out of the history's rows; the task's own input "
            "directions, projected out of the history's rows; or a start of docs/methods.md."
        },
    )
    row_scale: float = field(default=3.0, metadata={"help": "Strength of the rows of the start `contrast`."})
    merge: str = field(
        default="sum",
        metadata={"help": "How the tasks are merged into the model that is tested.", "choices": list(MERGES)},
    )
    directions: int = field(default=0, metadata={"help": "Input directions that each task stores."})
    fixed_a: bool = field(default=False, metadata={"help": "A does not train, only B; there is no penalty then."})


@dataclass(frozen=True)
class OLoRASettings(IncSettings):
    penalty_weight: float | None = field(
        default=None,
        metadata={"help": "lambda; the default of the penalty unless given: 0.05 for squared, 0.5 for l1."},
    )


@dataclass(frozen=True)
class ASOSettings(OLoRASettings):
    penalty: Literal["squared", "l1", "inputs", "outputs", "n_lora", "ella"] = field(
        default="squared", metadata={"help": "The penalty: Eq. 7, or one of docs/methods.md."}
    )
    attribution_model: Literal["auto", "cumulative", "task"] = field(
        default="auto", metadata={"help": "What the model of a task is: with its history, or its adapter alone."}
    )
    aggregation: Literal["per_example", "mean"] = field(
        default="per_example", metadata={"help": "Compare example by example, or the means over the probe."}
    )
    similarity: Literal["spearman", "pearson", "cosine", "none"] = field(
        default="spearman", metadata={"help": "w (Eq. 13); none: psi = 1, hard orthogonality."}
    )
    granularity: Literal["task", "layer"] = field(
        default="task", metadata={"help": "One psi for each earlier task, or one for each layer, too."}
    )
    source: Literal["current", "stored"] = field(
        default="current", metadata={"help": "The history's vectors: on the new task's data, or stored ones."}
    )
    refresh: float = field(
        default=0.25,
        metadata={"help": "Fraction of a run, or steps, between two refreshes of psi."},
    )
    probe: int = field(default=8, metadata={"help": "Examples that attribution reads (AttributionConfig: 16)."})
    steps: int = field(default=20, metadata={"help": "m of the integral (Eq. 11)."})
    quadrature: Literal["adaptive", "riemann", "gauss_legendre"] = field(
        default="adaptive", metadata={"help": "Rule of the integral."}
    )


class ASOLoRA(Method):
    """Soft orthogonality: the more the knowledge neurons of two tasks agree, the weaker the push apart."""

    title = "ASO-LoRA"
    Settings = ASOSettings
    trainer = ASOTrainer

    def config(self) -> ASOLoraConfig:
        """The settings of a task's adapter."""
        chosen = self.settings
        return ASOLoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,
            lora_dropout=chosen.dropout,
            target_modules=self.targets(),
            task_type="SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM",
            penalty=chosen.penalty,
            penalty_weight=chosen.penalty_weight,
            project_init=_STARTS.get(chosen.init, chosen.init),
            start_options={"row_scale": chosen.row_scale} if chosen.init == "contrast" else {},
            merge=chosen.merge,
            input_directions=chosen.directions,
            train_a=not chosen.fixed_a,
            attribution=AttributionConfig(
                steps=chosen.steps,
                quadrature=chosen.quadrature,
                attribution_model=chosen.attribution_model,
                aggregation=chosen.aggregation,
                similarity=chosen.similarity,
                granularity=chosen.granularity,
                source=chosen.source,
                refresh=chosen.refresh,
                probe_size=chosen.probe,
            ),
        )

    def start_task(self, task: Task, index: int) -> None:
        if index == 0:
            self.model = get_peft_model(self.model, self.config(), adapter_name=task.name)
        else:
            self.model.add_adapter(task.name, self.config())
            self.model.set_adapter(task.name)

    def predict(self, task: Task) -> Any:
        """The sum, which is the model that trains; or a copy that is merged in another way."""
        return self.model if self.settings.merge == "sum" else copy.deepcopy(self.model).merge_and_unload()

    def facts(self, task: Task) -> dict[str, Any]:
        config = self.model.peft_config[task.name]
        return {"psi": config.soft_coefficients or {}, "similarity": config.similarities or {}}

    def save(self, folder: Path) -> None:
        save_chain(self.model, folder / "chain")

    def restore(self, folder: Path, learned: Sequence[Task]) -> None:
        self.model = load_chain(self.model, folder / "chain")


class OLoRA(ASOLoRA):
    """Hard orthogonality, as published: psi is 1 and the penalty a sum of absolute values."""

    title = "O-LoRA"
    Settings = OLoRASettings

    def config(self) -> ASOLoraConfig:
        found = super().config()
        found.attribution.similarity, found.penalty = "none", "l1"
        return found


class IncLoRA(ASOLoRA):
    """No penalty."""

    title = "IncLoRA"
    Settings = IncSettings

    def config(self) -> ASOLoraConfig:
        found = super().config()
        found.attribution.similarity, found.penalty_weight = "none", 0.0
        return found
