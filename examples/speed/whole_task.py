"""A whole task at T = 15 with `ASOTrainer`, stored and current vectors, against IncLoRA on stock PEFT."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_aso import ASOSeq2SeqTrainer, ASOTrainer, AttributionConfig
from peft_aso.attribution import find_neurons

from .adapters import chain_of, stock_chain_of, task_name
from .batches import tokens
from .bench import Bench
from .records import Record
from .steps import same_logits, step_batch
from .timing import wait


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Random examples of about `length` tokens with an answer of one token."""

    def __init__(self, bench: Bench, count: int, length: int) -> None:
        spread = max(1, length // 30)
        self.seq2seq = bench.subject.kind == "seq2seq"
        ids = tokens(bench.subject, (count, length + spread), seed=11)
        generator = torch.Generator().manual_seed(12)
        lengths = torch.randint(length - spread, length + spread + 1, (count,), generator=generator)
        self.rows = [row[:end] for row, end in zip(ids, lengths.tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows[index]
        if self.seq2seq:
            return {"input_ids": ids[:-1], "labels": ids[-1:]}
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        return {"input_ids": ids, "labels": labels}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


class Clock(TrainerCallback):
    """Where the time of a run goes: between its events lie the refreshes of the coefficients.

    The Trainer calls it before the callback that refreshes: what passes between the end of one step and the start of
    the next is a refresh, if one is due, and next to nothing otherwise.
    """

    def __init__(self) -> None:
        self.since = 0.0
        self.steps: list[float] = []
        self.between: list[float] = []

    def _lap(self, into: list[float]) -> None:
        wait()
        now = time.perf_counter()
        into.append(now - self.since)
        self.since = now

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.since = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._lap(self.between)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._lap(self.steps)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.since = time.perf_counter()

    def parts(self, due: int) -> dict[str, float]:
        """Seconds by part, after the run; `due` is how many steps lie between two refreshes."""
        stored = time.perf_counter() - self.since
        again = [gap for index, gap in enumerate(self.between[1:], start=1) if due and index % due == 0]
        one = statistics.median(again) if again else 0.0
        return {
            "training": sum(self.steps) + sum(self.between[1:]) - sum(again),
            "attribution of the current task, while training": sum(again),
            "one refresh": one,
            "attribution before the first step (history, and the current task once)": self.between[0],
            "of which the history's, by subtraction": max(0.0, self.between[0] - one),
            "storing the vector at the end": stored,
        }


def run(bench: Bench, model: Any, ours: bool) -> tuple[float, Clock]:
    """Train one epoch; wall-clock seconds of `trainer.train()`."""
    sizes, seq2seq = bench.sizes, bench.subject.kind == "seq2seq"
    arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(
        output_dir=str(bench.scratch / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=sizes.task_batch,
        learning_rate=1e-3,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=bench.device.type == "cpu",
        dataloader_pin_memory=False,
        seed=0,
    )
    stock, aso = (Seq2SeqTrainer, ASOSeq2SeqTrainer) if seq2seq else (Trainer, ASOTrainer)
    clock = Clock()
    trainer = (aso if ours else stock)(
        model=model,
        args=arguments,
        train_dataset=Examples(bench, sizes.task_examples, sizes.task_tokens),
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    wait()
    start = time.perf_counter()
    trainer.train()
    wait()
    return time.perf_counter() - start, clock


def chain_for(bench: Bench, source: str) -> Any:
    """The chain of 15 random adapters; for stored vectors, random ones: their values change no time."""
    sizes = bench.sizes
    settings: Any = {"steps": sizes.steps, "quadrature": "adaptive", "probe_size": sizes.probe, "source": source}
    model = chain_of(bench.adapters(), sizes.loop_tasks, attribution=AttributionConfig(**settings))
    if source == "stored":
        layout, start = [], 0
        for layer in find_neurons(model):
            layout.append([layer.name, start, start + layer.size])
            start += layer.size
        for index in range(sizes.loop_tasks - 1):
            name = task_name(index)
            model.base_model.attribution[name] = torch.randn(start, generator=torch.Generator().manual_seed(index))
            model.peft_config[name].attribution_layout = layout
    return model


def whole_task(bench: Bench) -> list[Record]:
    """Stored and current vectors against IncLoRA, one after the other in turn."""
    sizes = bench.sizes
    times: dict[str, list[float]] = {"stock": [], "stored": [], "current": []}
    parts: dict[str, dict[str, float]] = {}
    checks = []
    for repeat in range(sizes.task_repeats):
        for kind, into in times.items():
            bench.say(f"whole task, {kind}, run {repeat + 1} of {sizes.task_repeats}")
            stock = kind == "stock"
            model = stock_chain_of(bench.adapters(), sizes.loop_tasks) if stock else chain_for(bench, kind)
            if kind == "stored" and not repeat:
                peer = stock_chain_of(bench.adapters(), sizes.loop_tasks)
                checks.append(same_logits(bench, model, peer, step_batch(bench), "before the run"))
                model.train()
                del peer
            taken, clock = run(bench, model, ours=not stock)
            into.append(taken)
            steps = -(-sizes.task_examples // sizes.task_batch)
            parts[kind] = clock.parts(0 if stock else max(1, -(-steps // 10)))
            bench.say(f"whole task, {kind}: {taken:.1f} s")
    limits = {"stored": 1.10, "current": 1.5 if bench.device.type == "cpu" else 1.15}
    return [
        Record(
            f"task.{kind}",
            bench.subject.label,
            f"a whole task, T = {sizes.loop_tasks}, {sizes.task_examples} x {sizes.task_tokens} tokens, batch "
            f"{sizes.task_batch}, probe {sizes.probe}, adaptive quadrature with m = {sizes.steps}, {kind} vectors",
            "IncLoRA on stock PEFT: all adapters active, the new one trained",
            times[kind],
            times["stock"],
            target=limits[kind],
            sameness=checks,
            notes={
                "seconds by part, last run": parts[kind],
                "IncLoRA's training, last run": parts["stock"]["training"],
                **({"stored vectors": "random"} if kind == "stored" else {}),
            },
        )
        for kind in ("stored", "current")
    ]
