"""The settings: `ASOLoraConfig` (one adapter, one task) and `AttributionConfig` (how its psi is found)."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME

from ..attribution.config import AttributionConfig, check_choice, is_number

PEFT_TYPE_NAME = "ASO_LORA"

# lambda of Eq. 7. The paper has 0.5 ("follow Wang et al."), which was tuned for the L1 form; in the squared form 0.05
# did better on validation data (docs/results.md, "How much penalty"). What the two forms weigh against each other is
# in docs/design.md.
DEFAULT_PENALTY_WEIGHT = {"squared": 0.05, "l1": 0.5}


def _check_weight(name: str, value: float) -> None:
    if not is_number(value) or value < 0:
        raise ValueError(f"{name}={value!r}: the weight of a penalty is a finite number that is not below 0.")


def _attribution_config(value: object) -> AttributionConfig:
    """The settings as they are, or from the dictionary that a saved config holds."""
    if isinstance(value, AttributionConfig):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"attribution={value!r}: give an AttributionConfig.")
    known = {setting.name for setting in fields(AttributionConfig)}
    unknown = sorted(set(value) - known)
    if unknown:
        warnings.warn(
            f"AttributionConfig has no settings {unknown}; they are left out. The adapter was saved by a "
            "newer version of peft-aso: upgrade it with pip install -U peft-aso.",
            stacklevel=4,
        )
    return AttributionConfig(**{name: value[name] for name in known & set(value)})


@dataclass
class ASOLoraConfig(LoraConfig):
    """Configuration of one task's adapter: everything that [`~peft.LoraConfig`] takes, and the settings
    below.

    Args:
        task_name (`str`, *optional*):
            The task's name in the chain. PEFT forgets adapter names when it saves; this one stays. Defaults
            to the name under which the adapter is added.
        history (`list[str]`, *optional*):
            Tasks learned before this one, oldest first. `None`: all tasks that the model holds when the
            adapter is added. `[]`: none.
        forward_history (`str`):
            Whether the frozen history takes part in the forward pass *while this task trains*: `"stacked"`
            (yes) or `"isolated"` (no). For evaluation and merging it always does (Eq. 3).
        history_form (`str`):
            How the frozen history is computed while this task is active. `"stacked"`: one pair of matrices a
            module, all earlier adapters in a row. `"dense"`: one matrix of the base weight's size. `"folded"`: the
            module runs with base weight + history in place of its base weight, which costs no time at all and, as the
            base weight itself stays as it is, a second matrix of its size. `"auto"`: folded in float32 and float64;
            stacked or dense, whichever is smaller, where folding would round the history to half precision (a
            bfloat16 or float16 base, or autocast) and where it is impossible (quantized or offloaded weights,
            embeddings). Convolutions run one adapter after another. `"folded"` also folds where it rounds, and is
            refused if no module of the model can be folded. A frozen weight that is written to by hand while a task
            trains on more than 16 others is noticed a few passes later (docs/design.md); in evaluation at once. A
            write through `weight.data`, which autograd does not see either, is not: write under `torch.no_grad()`.
        penalty (`str`):
            `"squared"` (Eq. 7) or `"l1"` (sum of absolute values, as O-LoRA).
        penalty_weight (`float`, *optional*):
            lambda of Eq. 7 for this task; 0 is IncLoRA. `None`: the default of the form, 0.05 for `"squared"` (from
            validation data, docs/results.md; the paper has 0.5) and 0.5 for `"l1"` (the paper, O-LoRA).
        l2_weight (`float`):
            Weight of the sum of the norms of this adapter's matrices (lambda_2 of O-LoRA).
        project_init (`bool` or `"inputs"`):
            Start A outside of the span of the history's A, so that the penalty starts at 0: PEFT's random values,
            projected (`True`), or the leading directions that the task's own inputs have out there (`"inputs"`, which
            `ASOTrainer` finds before the first step and `initialize_from_inputs` in a loop of your own).
        train_a (`bool`):
            Whether A trains. `False`: it stays as it starts, and B alone is trained. There is nothing for the penalty
            to push then, and its weight is 0. With `project_init="inputs"` the task keeps out of the history's span
            however it trains (docs/results.md says what that is worth).
        attribution (`AttributionConfig`):
            How w and psi are found.
        attribution_layout (`list`, *optional*):
            `[module, start, stop]` of each layer in the stored attribution vector. Written when saving.
        soft_coefficients, similarities (`dict`, *optional*):
            psi and w of each earlier task, as of the last refresh. Written by the training.
        combined (`bool`):
            Set on adapters made by `add_weighted_adapter`: they are no task and never become history by
            themselves.
        origin (`dict`, *optional*):
            The `repo_id`, `revision` and `folder` on the Hub that the adapter was loaded from, and the `sha256` of
            its weights then. Written by `load_chain`.
        peft_aso_version (`str`, *optional*):
            Version of this package that saved the config. Written when saving.

    Raises:
        ValueError: a value that is none of these, or settings that do not go together; what `LoraConfig` refuses.
        TypeError: a task name, history or attribution of another type.
    """

    task_name: str | None = None
    history: list[str] | None = None
    forward_history: Literal["stacked", "isolated"] = "stacked"
    history_form: Literal["auto", "stacked", "dense", "folded"] = "auto"
    penalty: Literal["squared", "l1"] = "squared"
    penalty_weight: float | None = None
    l2_weight: float = 0.0
    project_init: bool | Literal["inputs"] = False
    train_a: bool = True
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    attribution_layout: list[Any] | None = None
    soft_coefficients: dict[str, Any] | None = None
    similarities: dict[str, Any] | None = None
    combined: bool = False
    origin: dict[str, Any] | None = None
    peft_aso_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._chain: str | None = None  # no field: where a chain lies is nothing that is saved
        self.peft_type = PeftType(PEFT_TYPE_NAME)
        self.attribution = _attribution_config(self.attribution)
        check_choice("forward_history", self.forward_history, ("stacked", "isolated"))
        check_choice("history_form", self.history_form, ("auto", "stacked", "dense", "folded"))
        check_choice("penalty", self.penalty, tuple(DEFAULT_PENALTY_WEIGHT))
        if self.task_name is not None and (not isinstance(self.task_name, str) or not self.task_name):
            raise TypeError(f"task_name={self.task_name!r}: give the task's name, or None for the adapter's.")
        check_choice("project_init", self.project_init, (False, True, "inputs"))
        if self.project_init == "inputs" and self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"project_init='inputs' starts A itself and needs B to start at 0, and init_lora_weights="
                f"{self.init_lora_weights!r} does otherwise. Leave one of the two out."
            )
        if self.penalty_weight is not None:
            _check_weight("penalty_weight", self.penalty_weight)
            if self.penalty_weight > 0 and not self.train_a:
                raise ValueError(
                    f"penalty_weight={self.penalty_weight} pushes A, and with train_a=False A does not move. Leave "
                    "one of the two out."
                )
        _check_weight("l2_weight", self.l2_weight)
        if self.history is not None:
            is_list = isinstance(self.history, (list, tuple))
            if not is_list or not all(isinstance(task, str) for task in self.history):
                raise TypeError(f"history={self.history!r}: give a list of task names, oldest first.")
            self.history = list(self.history)
            if len(set(self.history)) != len(self.history):
                raise ValueError(f"history={self.history} names a task twice.")

    @property
    def resolved_penalty_weight(self) -> float:
        """lambda of Eq. 7: `penalty_weight`, or the default of the form where that is None; 0 where A is fixed."""
        if not self.train_a:
            return 0.0
        return DEFAULT_PENALTY_WEIGHT[self.penalty] if self.penalty_weight is None else self.penalty_weight

    @property
    def attribution_model(self) -> str:
        """`"cumulative"` or `"task"`: `attribution.attribution_model` with "auto" resolved."""
        if self.attribution.attribution_model != "auto":
            return self.attribution.attribution_model
        return "cumulative" if self.forward_history == "stacked" else "task"

    @property
    def chain(self) -> str | None:
        """The folder or the id on the Hub that `load_chain` finds this task and its history in, as far as reading the
        config with `from_pretrained` (as PEFT's loaders do) has told."""
        return self._chain

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ASOLoraConfig:
        """As PEFT's; and the config knows where its `chain` lies."""
        config: ASOLoraConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._chain = _chain_around(pretrained_model_name_or_path, config.history or [])
        return config

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with the version of this package, the nested settings as a plain dictionary, and lambda as a
        number, because a later version may have another default."""
        from .. import __version__

        result: dict[str, Any] = super().to_dict()
        result["attribution"] = asdict(self.attribution)
        result["penalty_weight"] = self.resolved_penalty_weight
        result["peft_aso_version"] = __version__
        return result


def _chain_around(source: str | os.PathLike[str], history: list[str]) -> str | None:
    """The id, or the folder (this one, or the one that it lies in) that has a task of the history in it."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    places = [place for place in (folder, folder.parent) for task in history if (place / task / CONFIG_NAME).is_file()]
    return str(places[0]) if places else None
