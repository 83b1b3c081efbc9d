"""What a method does at the four points of a chain: a task starts, a loss is taken, a task ends, a test comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from tasks import Task
from torch.utils.data import Dataset
from transformers import Trainer

if TYPE_CHECKING:
    from ..settings import Settings


class MethodTrainer(Trainer):
    """transformers' Trainer with what the method adds to the loss."""

    method: Method

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        more = self.method.training_loss(inputs, outputs) if model.training else None
        if more is not None:
            # of the step's answer tokens, how many are in this micro-batch
            share = 1 if num_items_in_batch is None else (inputs["labels"] != -100).sum() / num_items_in_batch
            loss = loss + share * more
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class NoSettings:
    """A method without settings."""


class Method:
    """A way to learn tasks one after another. Subclasses define what differs; this one trains nothing.

    Attributes:
        title: its name in tables.
        Settings: a frozen dataclass of the method's options, each with a default and `metadata={"help": ...}`.
        trainer: the Trainer that trains it.
        alone: every task has its own model, so that no order matters.
        model: what is trained and tested; a method sets it anew where a task needs more weights.
    """

    title = ""
    Settings: type = NoSettings
    trainer: type[Trainer] = MethodTrainer
    alone = False

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.device = model.device

    @classmethod
    def trains_all(cls, settings: Settings) -> bool:
        """Whether all weights are trained, rather than adapters."""
        return False

    @property
    def learning_rate(self) -> float:
        return self.settings.lr_full if self.trains_all(self.settings) else self.settings.lr

    # ---- the four points ------------------------------------------------------------------------------------------

    def start_task(self, task: Task, index: int) -> None:
        """Before the training on task number `index`."""

    def training_rows(self, task: Task) -> list[tuple[str, str]]:
        """Prompts and answers to train on."""
        return task.train

    def training_loss(self, inputs: dict[str, Any], outputs: Any) -> torch.Tensor | None:
        """What is added to the loss of a batch, a mean over its answers' tokens; None: nothing."""
        return None

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        """After the training, with the tokenized examples that it had."""

    def predict(self, task: Task) -> Any:
        """The model that answers; the task is given for methods that need to know it, and most do not."""
        return self.model

    def facts(self, task: Task) -> dict[str, Any]:
        """What else belongs into the record of the task that has just ended, as JSON."""
        return {}

    # ---- going on after a stop ------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what the next task needs."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state().items()}
        save_file(tensors, folder / "model.safetensors")

    @torch.no_grad()
    def restore(self, folder: Path, learned: Sequence[Task]) -> None:
        """Be as `save` found it, `learned` being the tasks until then."""
        self.load_state(load_file(folder / "model.safetensors"), learned)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors to save: the trained weights, and in subclasses what the method remembers."""
        return dict(self.trained())

    def load_state(self, tensors: dict[str, torch.Tensor], learned: Sequence[Task]) -> None:
        """The opposite of `state`."""
        for name, parameter in self.trained().items():
            parameter.copy_(tensors[name])

    # ---- what methods share -----------------------------------------------------------------------------------------

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def answers(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The rows `(tokens, vocabulary)` of `logits` that predict a token of an answer, in float32."""
        if self.seq2seq:
            return logits[labels != -100].float()
        return logits[:, :-1][labels[:, 1:] != -100].float()

    def targets(self) -> list[str]:
        """The modules that adapters are put on: the run's, or PEFT's for LoRA on this architecture."""
        if self.settings.target_modules:
            return self.settings.target_modules.split(",")
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        return list(known.get(self.model.config.model_type, ["q_proj", "v_proj"]))

    def lora(self) -> LoraConfig:
        """Stock LoRA with the run's settings."""
        return LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules=self.targets(),
            task_type="SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM",
        )
