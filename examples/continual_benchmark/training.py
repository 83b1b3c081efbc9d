"""The training of one task, the same for every method."""

from __future__ import annotations

import math
import tempfile
import zlib

import torch
from tasks import AnswerDataset, ProgressBar, Task, best_device
from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from .methods import Method
from .settings import Settings

Log = dict[str, list[float | None]]  # what the Trainer logs, one value a step; None where a step did not have it


def seed_of(settings: Settings, task: Task) -> int:
    """A seed for each task, the same at any place of an order, and where it is learned alone."""
    return zlib.crc32(f"{settings.seed} {task.name}".encode()) % 2**31


def learn(method: Method, task: Task, index: int, settings: Settings) -> Log:
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
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=settings.batch_size // at_once,
            learning_rate=method.learning_rate,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            bf16=settings.precision == "bf16",
            use_cpu=best_device().type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would log 0 in place of a loss that is not a number
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = method.trainer(
            model=method.model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(method.tokenizer, padding=True),
        )
        trainer.method = method
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(entry["loss"]) for entry in steps):
        raise RuntimeError(f"{task.name}: the loss is not a number any more; lower --lr, or use --precision float32.")
    method.end_task(task, rows)
    names = [name for name in dict.fromkeys(key for entry in steps for key in entry) if name not in ("epoch", "step")]
    return {name: [entry.get(name) for entry in steps] for name in names}
