"""The training of one task, the same for every method."""

from __future__ import annotations

import math
import tempfile
import zlib
from typing import Any

import torch
from tasks import AnswerDataset, Task, best_device, bf16_is_faster
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    set_seed,
)

from .methods import Method
from .settings import Settings


class Bar(ProgressCallback):
    """The Trainer's progress bar without a line for each step: the logs go into the results."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


def seed_of(settings: Settings, task: Task) -> int:
    """A seed for each task, the same wherever it stands in an order, and where it is learned alone."""
    return zlib.crc32(f"{settings.seed} {task.name}".encode()) % 2**31


def in_bf16(settings: Settings) -> bool:
    """Whether products are taken in bfloat16."""
    return bf16_is_faster() if settings.precision == "auto" else settings.precision == "bf16"


def learn(method: Method, task: Task, index: int, settings: Settings) -> list[dict[str, float]]:
    """Train `method` on task number `index`; what was logged at each step.

    Raises:
        RuntimeError: the loss is not a number any more.
    """
    seed = seed_of(settings, task)
    set_seed(seed)
    method.start_task(task, index)
    at_once = settings.micro_batch or settings.batch_size
    rows = AnswerDataset(method.training_rows(task), method.tokenizer, method.seq2seq, settings.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Seq2SeqTrainingArguments if method.seq2seq else TrainingArguments)(
            output_dir=folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=settings.batch_size // at_once,
            learning_rate=method.learning_rate,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            bf16=in_bf16(settings),
            use_cpu=best_device().type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would log 0 in place of a loss that is not a number
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer: Any = method.trainer(
            model=method.model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(method.tokenizer, padding=True),
            optimizers=(_optimizer(method, settings), None),
            callbacks=method.callbacks(),
        )
        trainer.method, trainer.part_size = method, settings.part
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Bar())
        trainer.train()
        logs = [_numbers(entry) for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(entry["loss"]) for entry in logs):
        raise RuntimeError(f"{task.name}: the loss is not a number any more; lower --lr, or use --precision float32.")
    method.end_task(task, rows)
    return logs


def _optimizer(method: Method, settings: Settings) -> torch.optim.Optimizer | None:
    """AdamW with a learning rate for A and one for B; None, the Trainer's own, where they are the same."""
    if settings.lr_a is None:
        return None
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in method.trained().items():
        groups["lora_A" in name].append(parameter)
    rates = {True: settings.lr_a, False: method.learning_rate}
    return torch.optim.AdamW(
        [{"params": groups[is_a], "lr": rate} for is_a, rate in rates.items() if groups[is_a]], weight_decay=0.0
    )


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
