"""The settings: `ASOLoraConfig` (one adapter, one task) and `AttributionConfig` (how its psi is found)."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME

PEFT_TYPE_NAME = "ASO_LORA"

# lambda of Eq. 7. The paper has 0.5 ("follow Wang et al."), which was tuned for the L1 form; in the squared form 0.05
# did better on validation data (docs/results.md, "How much penalty"). What the two forms weigh against each other is
# in docs/design.md.
DEFAULT_PENALTY_WEIGHT = {"squared": 0.05, "l1": 0.5}


def _check_choice(name: str, value: object, choices: tuple[str | bool, ...]) -> None:
    if not any(value is each or (isinstance(each, str) and value == each) for each in choices):
        raise ValueError(f"{name}={value!r} is not known. Choose one of: {', '.join(map(str, choices))}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_weight(name: str, value: float) -> None:
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name}={value!r}: the weight of a penalty is a finite number that is not below 0.")


@dataclass
class AttributionConfig:
    """How the attribution vectors are computed and turned into the similarity w and the coefficient psi.

    Args:
        steps (`int`):
            m of Eq. 11: how many points the gradient is taken at, or, `"adaptive"`, how finely.
        quadrature (`str`):
            `"adaptive"` (for each layer and example as few points as it takes for the change of P to come out right to
            a part 1/m: about four where m is 20, and nearer to the integral than 20 even ones, docs/performance.md),
            `"riemann"` (right Riemann sum, the paper to the letter) or `"gauss_legendre"`.
        neurons (`str` or `list[str]`, *optional*):
            Which modules' inputs are the FFN neurons: a regular expression that matches the whole module
            name, or a list of name endings. `None` finds the down projections by structure.
        stacks (`str`):
            Of an encoder-decoder: `"all"`, `"encoder"` or `"decoder"` neurons.
        max_rows (`int`, *optional*):
            Most rows (examples x steps x layers) that run through the model at once. `None` chooses.
        max_answer_tokens (`int`):
            A longer answer is refused: most often it is a prompt whose labels were not set to -100.
        attribution_model (`str`):
            What "the model of task t" is: `"cumulative"` (base + adapters 1..t), `"task"` (base + adapter t
            alone, Eq. 2) or `"auto"` (cumulative when the history is in the forward pass while a task trains,
            else task).
        aggregation (`str`):
            `"per_example"` (w of each probe example, then the mean) or `"mean"` (w of the mean vectors).
        absolute (`bool`):
            Compare absolute scores instead of signed ones.
        similarity (`str`):
            `"spearman"` (the paper), `"pearson"`, `"cosine"`, or `"none"`: w = 0 and psi = 1 (hard
            orthogonality, as O-LoRA), and no attribution is computed at all.
        granularity (`str`):
            `"task"` (one w for each earlier task) or `"layer"` (one for each earlier task and layer).
        source (`str`):
            `"current"` (the history's models look at the new task's data, Eq. 13) or `"stored"` (each earlier
            task's own vector, kept at its end, is compared: no old model is run).
        clip (`bool`):
            Clip psi to [0, 1]. Off: Eq. 6 as it stands, where a negative w makes psi larger than 1.
        refresh (`float` or `int`):
            When the current task's vector is computed again: a fraction of the run if below 1, else a number
            of optimizer steps; 0 only once, before the first step.
        probe_size (`int`):
            How many training examples the vectors are computed on. With 16 the standard error of w is 0.02 to
            0.04 (docs/performance.md); it halves with four times as many.

    Raises:
        ValueError: a value that is none of these.
    """

    steps: int = 20
    quadrature: Literal["riemann", "gauss_legendre", "adaptive"] = "adaptive"
    neurons: str | list[str] | None = None
    stacks: Literal["all", "encoder", "decoder"] = "all"
    max_rows: int | None = None
    max_answer_tokens: int = 64
    attribution_model: Literal["auto", "cumulative", "task"] = "auto"
    aggregation: Literal["per_example", "mean"] = "per_example"
    absolute: bool = False
    similarity: Literal["spearman", "pearson", "cosine", "none"] = "spearman"
    granularity: Literal["task", "layer"] = "task"
    source: Literal["current", "stored"] = "current"
    clip: bool = False
    refresh: float = 0.1
    probe_size: int = 16

    def __post_init__(self) -> None:
        _check_choice("quadrature", self.quadrature, ("riemann", "gauss_legendre", "adaptive"))
        _check_choice("stacks", self.stacks, ("all", "encoder", "decoder"))
        _check_choice("attribution_model", self.attribution_model, ("auto", "cumulative", "task"))
        _check_choice("aggregation", self.aggregation, ("per_example", "mean"))
        _check_choice("similarity", self.similarity, ("spearman", "pearson", "cosine", "none"))
        _check_choice("granularity", self.granularity, ("task", "layer"))
        _check_choice("source", self.source, ("current", "stored"))
        for name in ("steps", "probe_size", "max_answer_tokens"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1.")
        if self.max_rows is not None and not _is_count(self.max_rows):
            raise ValueError(f"max_rows={self.max_rows!r} must be at least 1, or None to choose.")
        if not _is_number(self.refresh) or self.refresh < 0 or (self.refresh > 1 and self.refresh % 1):
            raise ValueError(
                f"refresh={self.refresh!r}: give a fraction of the run (0.1: ten times), a whole number of "
                "steps (50), or 0 for once at the start."
            )


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
        _check_choice("forward_history", self.forward_history, ("stacked", "isolated"))
        _check_choice("history_form", self.history_form, ("auto", "stacked", "dense", "folded"))
        _check_choice("penalty", self.penalty, tuple(DEFAULT_PENALTY_WEIGHT))
        if self.task_name is not None and (not isinstance(self.task_name, str) or not self.task_name):
            raise TypeError(f"task_name={self.task_name!r}: give the task's name, or None for the adapter's.")
        _check_choice("project_init", self.project_init, (False, True, "inputs"))
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
