"""`ASOLoraConfig`: the settings of one task's adapter."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig, PeftType

from ..attribution.config import AttributionConfig, check_choice, check_fields, setting
from .low_rank import MERGES, merge_needs_inputs
from .penalties import PENALTIES
from .starts import STARTS, needs_history_inputs, needs_inputs, random_start

PEFT_TYPE_NAME = "ASO_LORA"
INPUT_DIRECTIONS = 32


def _names(registry: Any) -> str:
    return ", ".join(map(repr, registry))


def _attribution_config(value: dict[str, Any]) -> AttributionConfig:
    """The settings in the dictionary of a saved config."""
    known = {setting.name for setting in fields(AttributionConfig)}
    if unknown := sorted(set(value) - known):
        warnings.warn(
            f"AttributionConfig has no settings {unknown}; they are ignored. The adapter was saved by a newer version "
            "of peft-aso: upgrade it with pip install -U peft-aso.",
            stacklevel=4,
        )
    return AttributionConfig(**{name: value[name] for name in known & set(value)})


@dataclass
class ASOLoraConfig(LoraConfig):
    """Configuration of one task's adapter: everything that `LoraConfig` takes, and the fields below.

    Raises:
        ValueError: a value outside of what a field's help lists, settings that contradict each other, or what
            `LoraConfig` refuses.
        TypeError: a value of one of these fields that is of another type.
    """

    task_name: str | None = setting(
        None,
        "The task's name in the chain. It is saved with the adapter. Defaults to the name under which the adapter "
        "is added.",
    )
    history: list[str] | None = setting(
        None,
        "Tasks learned before this one, oldest first. None: all tasks of the model when the adapter is added. []: "
        "none, the adapter is stock LoRA.",
    )
    forward_history: Literal["stacked", "isolated"] = setting(
        "stacked",
        "Whether the frozen history takes part in the forward pass while this task trains: 'stacked' (yes) or "
        "'isolated' (no). In evaluation and merging it always does (Eq. 3).",
    )
    history_form: Literal["auto", "stacked", "folded"] = setting(
        "auto",
        "How the frozen history is computed: 'stacked' (all earlier adapters of a module as one low-rank pair), "
        "'folded' (base weight + history as one weight, a second matrix of the base weight's size and no extra "
        "time), or 'auto' (folded in float32 and float64; stacked if folding would round the history to half "
        "precision or is impossible: quantized or offloaded weights, embeddings, convolutions).",
    )
    penalty: str = setting("squared", f"The orthogonality penalty (Eq. 7). Registered: {_names(PENALTIES)}.")
    penalty_weight: float | None = setting(
        None,
        "lambda of Eq. 7 for this task; 0 is IncLoRA. None: the default of the penalty, 0.05 for 'squared' (the "
        "paper has 0.5) and 0.5 for 'l1'.",
    )
    l2_weight: float = setting(0.0, "Weight of the sum of the norms of this adapter's matrices (lambda_2 of O-LoRA).")
    project_init: bool | str = setting(
        False,
        "Start A outside of the span of the history's A, so that the penalty starts at 0. Registered: "
        f"{_names(STARTS)}; True is 'random', False starts A as LoRA does.",
    )
    start_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the start that project_init names, such as {'row_scale': 2.0} of 'contrast'."},
    )
    train_a: bool = setting(True, "Whether A trains. False: B alone is trained, and there is no penalty.")
    merge: Any = setting(
        "sum",
        f"How the tasks are merged into one model (Eq. 3), or the weight of each task. Registered: {_names(MERGES)}.",
    )
    input_directions: int | None = setting(
        None,
        "How many leading directions of its inputs to a module the task stores, for later tasks and for merging. "
        f"None: {INPUT_DIRECTIONS} if project_init, penalty or merge of this task reads those of others, else 0.",
    )
    attribution: AttributionConfig = field(
        default_factory=AttributionConfig,
        metadata={"help": "How the similarity w and the soft coefficient psi are computed."},
    )
    attribution_layout: list[Any] | None = setting(
        None, "[module, start, stop] of each layer in the stored attribution vector. Written by the training."
    )
    soft_coefficients: dict[str, Any] | None = setting(
        None, "psi of each earlier task (Eq. 6), as of the last update. Written by the training."
    )
    similarities: dict[str, Any] | None = setting(
        None, "w of each earlier task (Eq. 13), as of the last update. Written by the training."
    )
    history_hashes: dict[str, str] | None = setting(
        None,
        "SHA-256 of the weights and scale of each task of the history. Written when the adapter is added, checked "
        "when it is loaded.",
    )
    combined: bool = setting(
        False, "Set on adapters made by add_weighted_adapter: they are no task and never become history by default."
    )
    origin: dict[str, Any] | None = setting(
        None,
        "repo_id, revision and folder on the Hub that the adapter was loaded from, and the sha256 of its weights "
        "then. Written by load_chain.",
    )
    peft_aso_version: str | None = setting(None, "Version of peft-aso that saved the config. Written when saving.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._adapter_name: str | None = None  # set when it is added: with history=[] the user's object is not changed
        self.peft_type = PeftType(PEFT_TYPE_NAME)
        if isinstance(self.attribution, dict):
            self.attribution = _attribution_config(self.attribution)
        if self.history_form == "dense":  # type: ignore[comparison-overlap]  # of earlier versions
            self.history_form = "auto"
        if isinstance(self.history, tuple):
            self.history = list(self.history)
        check_fields(self, ASOLoraConfig)
        check_choice("penalty", self.penalty, tuple(PENALTIES))
        check_choice("project_init", self.project_init, (False, True, *STARTS))
        if not isinstance(self.merge, Mapping):
            check_choice("merge", self.merge, tuple(MERGES))
        elif not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in self.merge.values()):
            raise TypeError(f"merge={self.merge}: give a registered name, or a finite number for each task.")
        if (self.input_directions or 0) < 0:
            raise ValueError(f"input_directions={self.input_directions}: a number of directions, 0 for none.")
        if self.start_options:
            start = STARTS.get(str(self.project_init), random_start)
            known = [p.name for p in inspect.signature(start).parameters.values() if p.kind is p.KEYWORD_ONLY]
            if unknown := sorted(set(self.start_options) - set(known)):
                raise ValueError(f"start_options: project_init={self.project_init!r} has {known} and no {unknown}.")
        if self.task_name == "":
            raise ValueError("task_name='': give the task's name, or None for the adapter's.")
        if needs_inputs(self.project_init) and self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"project_init={self.project_init!r} needs B to start at 0, and init_lora_weights="
                f"{self.init_lora_weights!r} starts it otherwise. Leave one of the two out."
            )
        for name in ("penalty_weight", "l2_weight"):
            weight = getattr(self, name) or 0.0
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"{name}={weight}: the weight of a penalty is a finite number that is not below 0.")
        if self.penalty_weight and not self.train_a:
            raise ValueError(
                f"penalty_weight={self.penalty_weight} acts on A, and with train_a=False A does not move. Leave "
                "one of the two out."
            )
        if self.history is not None and len(set(self.history)) != len(self.history):
            raise ValueError(f"history={self.history} names a task twice.")

    @property
    def resolved_penalty_weight(self) -> float:
        """lambda of Eq. 7: `penalty_weight`, or the default of the penalty if that is None; 0 with `train_a=False`."""
        if not self.train_a:
            return 0.0
        return PENALTIES[self.penalty].default_weight if self.penalty_weight is None else self.penalty_weight

    @property
    def resolved_input_directions(self) -> int:
        """`input_directions`, with None resolved."""
        if self.input_directions is not None:
            return self.input_directions
        reads = needs_history_inputs(self.project_init) or merge_needs_inputs(self.merge)
        reads = reads or (PENALTIES[self.penalty].needs_inputs and self.resolved_penalty_weight > 0)
        return INPUT_DIRECTIONS if reads else 0

    @property
    def attribution_model(self) -> str:
        """`"cumulative"` or `"task"`: `attribution.attribution_model` with "auto" resolved."""
        if self.attribution.attribution_model != "auto":
            return self.attribution.attribution_model
        return "cumulative" if self.forward_history == "stacked" else "task"

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with the version of this package, the nested settings as a dictionary, and lambda as a number,
        because a later version may have another default."""
        from .. import __version__

        result: dict[str, Any] = super().to_dict()
        result["task_name"] = self.task_name or self._adapter_name
        result["attribution"] = asdict(self.attribution)
        result["penalty_weight"] = self.resolved_penalty_weight
        result["peft_aso_version"] = __version__
        return result
