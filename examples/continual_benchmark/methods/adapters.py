"""One adapter a task, earlier ones frozen: ASO-LoRA, O-LoRA and IncLoRA, which are one code path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model
from tasks import AnswerDataset, Task
from transformers import DataCollatorForSeq2Seq, Trainer

from peft_aso import (
    ASOLoraConfig,
    ASOTrainerMixin,
    AttributionConfig,
    load_chain,
    save_chain,
)

from ..parts import InPartsMixin
from .base import Method
from .gradients import PenaltyGradient

_FEW, _BATCH = 64, 16  # examples that `few_batches` gives, and how many in a batch


class PenaltyTrainer(ASOTrainerMixin, InPartsMixin, Trainer):
    """`ASOTrainer`, in parts."""


class ASOLoRA(Method):
    """Soft orthogonality: the more the knowledge neurons of two tasks agree, the weaker the push apart."""

    title = "ASO-LoRA"
    trainer = PenaltyTrainer

    @classmethod
    def first_stage(cls, settings: Any) -> dict[str, Any]:
        """A first task has no history: how A starts, lambda_2 and which vectors are stored is all that matters."""
        vectors = settings.similarity != "none" and {name: getattr(settings, name) for name in _VECTORS}
        start = "default" if settings.init == "projected" else settings.init
        unusual = {name: found for name, usual in _USUAL.items() if (found := getattr(settings, name)) != usual}
        return {"adapters": start, "vectors": vectors, **unusual}

    def config(self, index: int) -> ASOLoraConfig:
        """The settings of task number `index`."""
        chosen = self.settings
        weights = chosen.penalty_weight
        return ASOLoraConfig(
            **{name: value for name, value in self.lora().to_dict().items() if name in _LORA},
            forward_history=chosen.forward_history,
            penalty=chosen.penalty,
            penalty_weight=None if weights is None else weights[index if len(weights) > 1 else 0],
            l2_weight=chosen.l2_weight,
            project_init=_STARTS.get(chosen.init, False),
            train_a=not chosen.fixed_a,
            attribution=AttributionConfig(
                neurons=None if chosen.neurons is None else list(chosen.neurons),
                stacks=chosen.stacks,
                steps=chosen.steps,
                quadrature=chosen.quadrature,
                attribution_model=chosen.attribution_model,
                aggregation=chosen.aggregation,
                absolute=chosen.absolute,
                similarity=chosen.similarity,
                granularity=chosen.granularity,
                source=chosen.source,
                clip=chosen.clip,
                refresh=chosen.refresh,
                probe_size=chosen.probe,
            ),
        )

    def start_task(self, task: Task, index: int) -> None:
        if index == 0:
            self.model = get_peft_model(self.model, self.config(index), adapter_name=task.name)
        else:
            self.model.add_adapter(task.name, self.config(index))
            self.model.set_adapter(task.name)

    def few_batches(self, task: Task) -> list[dict[str, Any]]:
        """The first examples of a task, collated."""
        chosen = self.settings
        rows = AnswerDataset(task.train[:_FEW], self.tokenizer, self.seq2seq, chosen.max_tokens)
        collate = DataCollatorForSeq2Seq(self.tokenizer, padding=True)
        parts = [[rows[i] for i in range(at, min(at + _BATCH, len(rows)))] for at in range(0, len(rows), _BATCH)]
        return [{name: value.to(self.device) for name, value in collate(part).items()} for part in parts]

    def callbacks(self) -> list[Any]:
        return [PenaltyGradient()] if self.settings.diagnose else []

    def facts(self, task: Task) -> dict[str, Any]:
        config = self.model.peft_config[task.name]
        return {"psi": config.soft_coefficients or {}, "similarity": config.similarities or {}}

    def save(self, folder: Path) -> None:
        save_chain(self.model, folder / "chain")

    def restore(self, folder: Path, learned: Sequence[Task]) -> None:
        self.model = load_chain(self.model, folder / "chain")


_STARTS = {"projected": True, "inputs_hard": "inputs"}
_VECTORS = ("steps", "quadrature", "probe", "aggregation", "attribution_model", "source")
_USUAL = {"fixed_a": False, "l2_weight": 0.0, "neurons": None, "stacks": "all"}  # counts where it is something else
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type")


class OLoRA(ASOLoRA):
    """Hard orthogonality, as published: psi is 1 and the penalty a sum of absolute values."""

    title = "O-LoRA"

    @classmethod
    def first_stage(cls, settings: Any) -> dict[str, Any]:
        return {**super().first_stage(settings), "vectors": False}

    def config(self, index: int) -> ASOLoraConfig:
        found = super().config(index)
        found.attribution.similarity, found.penalty = "none", "l1"
        return found


class IncLoRA(ASOLoRA):
    """No penalty."""

    title = "IncLoRA"

    @classmethod
    def first_stage(cls, settings: Any) -> dict[str, Any]:
        return {**super().first_stage(settings), "vectors": False}

    def config(self, index: int) -> ASOLoraConfig:
        found = super().config(index)
        found.attribution.similarity, found.penalty_weight = "none", 0.0
        return found
