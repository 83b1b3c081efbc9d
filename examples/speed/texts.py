"""Batches of real text from the tasks of a folder (examples/data); random ones for models without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks import AnswerDataset, read_task, task_names
from transformers import DataCollatorForSeq2Seq

from .batches import Batch, answered
from .bench import Bench

BATCH = 8


def text_batches(bench: Bench, examples: int, names: list[str] | None = None) -> dict[str, list[Batch]]:
    """Task name to collated batches of its first `examples` training examples, prompt and answer.

    A model without a tokenizer gets random prompts, under the names `task0`, `task1` and so on.
    """
    if bench.subject.tokenizer is None:
        chosen = names or ["task0", "task1"]
        length = bench.sizes.encoder_tokens
        return {
            name: _moved(bench, [answered(bench.subject, length, [1] * examples, seed=1 + index)])
            for index, name in enumerate(chosen)
        }
    data: Path = bench.options.data
    return {name: _of_task(bench, data / name, examples) for name in names or task_names(data)}


def _of_task(bench: Bench, folder: Path, examples: int) -> list[Batch]:
    tokenizer: Any = bench.subject.tokenizer
    rows = read_task(folder, train_limit=examples).train
    dataset = AnswerDataset(rows, tokenizer, bench.subject.kind == "seq2seq")
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    encoded = [dataset[index] for index in range(len(dataset))]
    batches = [dict(collate(encoded[start : start + BATCH])) for start in range(0, len(encoded), BATCH)]
    return _moved(bench, batches)


def _moved(bench: Bench, batches: list[Any]) -> list[Batch]:
    return [{name: value.to(bench.device) for name, value in each.items()} for each in batches]
