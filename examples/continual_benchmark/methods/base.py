"""What a method is asked at the four points of a chain: a task starts, a loss is taken, a task ends, a test comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from tasks import Task
from torch.utils.data import Dataset
from transformers import Trainer

from ..parts import InPartsMixin, Inputs, Part, takes_parts

if TYPE_CHECKING:
    from ..settings import Settings


class LossTrainer(InPartsMixin, Trainer):
    """transformers' Trainer with what the method adds to the loss."""

    method: Method
    task_loss: torch.Tensor | None = None  # of this step so far, if the method adds to it

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, parts = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            if self.args.gradient_accumulation_steps > 1 and not takes_parts(model):
                loss = _share(parts, num_items_in_batch) * _mean_loss(parts)  # T5 gives the mean, whatever it is told
            more = self.method.training_loss(inputs, parts)
            if more is not None:
                self.task_loss = loss.detach() + (0 if self.task_loss is None else self.task_loss)
                loss = loss + _share(parts, num_items_in_batch) * more
        return (loss, parts) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the task's own loss where the method added to it."""
        if "loss" in logs and self.task_loss is not None:
            logs, self.task_loss = {**logs, "task_loss": float(self.task_loss)}, None
        super().log(logs, *args, **kwargs)


def _share(parts: list[Part], step_tokens: Any) -> Any:
    """How much of a step's answer tokens are in this batch; all where a step is one batch."""
    return 1 if step_tokens is None else sum((part.targets != -100).sum() for part in parts) / step_tokens


def _mean_loss(parts: list[Part]) -> torch.Tensor:
    """Over all tokens of the answers."""
    said = torch.cat([part.answers(part.outputs.logits).float() for part in parts])
    return torch.nn.functional.cross_entropy(said, torch.cat([part.answers(part.targets) for part in parts]))


class Method:
    """A way to learn tasks one after another. Subclasses say what is their own and inherit the rest: nothing.

    Attributes:
        title: its name in tables.
        model: what is trained and tested; a method sets it anew where a task asks for more weights.
        alone: every task has a model of its own, so that no order matters.
    """

    title = ""
    alone = False
    trainer: type[Trainer] = LossTrainer

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.device = model.device

    @classmethod
    def scope_of(cls, settings: Settings) -> str:
        """What is trained: "lora" or "full"."""
        return "lora"

    @classmethod
    def first_stage(cls, settings: Settings) -> dict[str, Any] | None:
        """What the first stage depends on beside the training's settings; None: runs do not share it."""
        return None

    @property
    def learning_rate(self) -> float:
        return self.settings.lr if self.scope_of(self.settings) == "lora" else self.settings.lr_full

    # ---- the four points ------------------------------------------------------------------------------------------

    def start_task(self, task: Task, index: int) -> None:
        """Before the training on task number `index`."""

    def training_rows(self, task: Task) -> list[tuple[str, str]]:
        """What is trained on."""
        return task.train

    def training_loss(self, inputs: Inputs, parts: list[Part]) -> torch.Tensor | None:
        """What comes to the loss of the batch `inputs`, which went through the model in these parts: the mean over its
        answers' tokens, or what is the same for any batch."""
        return None

    def end_task(self, task: Task, examples: Dataset[Any]) -> None:
        """After the training, with the tokenized examples that it had."""

    @contextmanager
    def predict(self, task: Task) -> Iterator[Any]:
        """The model that answers; the task's name is there for methods that need it, and most do not."""
        yield self.model

    def facts(self, task: Task) -> dict[str, Any]:
        """What else is worth writing down about the task that has just ended, as JSON."""
        return {}

    def callbacks(self) -> list[Any]:
        """What else the Trainer should call."""
        return []

    # ---- going on after a stop ------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what the next task needs."""
        tensors = {name: p.detach().contiguous().cpu() for name, p in self.trained().items()}
        save_file(
            {**tensors, **{f"method.{name}": value for name, value in self.memory().items()}},
            folder / "model.safetensors",
        )

    def restore(self, folder: Path, learned: Sequence[Task]) -> None:
        """Be as `save` found it, `learned` being the tasks until then."""
        tensors = load_file(folder / "model.safetensors")
        trained = self.trained()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors.pop(name))
        self.remember({name.removeprefix("method."): value for name, value in tensors.items()}, learned)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def memory(self) -> dict[str, torch.Tensor]:
        """What the method keeps beside weights."""
        return {}

    def remember(self, memory: dict[str, torch.Tensor], learned: Sequence[Task]) -> None:
        """The opposite of `memory`."""

    def targets(self) -> list[str]:
        """The modules that adapters are put on: the run's, or those that PEFT has for LoRA on this architecture."""
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
            self.model.config.model_type, ["q_proj", "v_proj"]
        )
        return list(self.settings.target_modules or known)

    def lora(self) -> LoraConfig:
        """Stock LoRA with the run's settings."""
        chosen = self.settings
        return LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,
            lora_dropout=chosen.dropout,
            target_modules=self.targets(),
            task_type="SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM",
        )
