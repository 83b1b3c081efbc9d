"""What a user's own program looks like to mypy: `make lint` checks it, strict; it is not run.

Each call of the public face stands here once, and `assert_type` says what a user gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import assert_type

import peft_aso
from peft_aso import ASOLoraConfig, AttributionConfig, AttributionVector, Coefficients
from peft_aso.attribution import similarity_matrix
from peft_aso.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer


def configure() -> ASOLoraConfig:
    return ASOLoraConfig(r=8, task_type="CAUSAL_LM", attribution=AttributionConfig(steps=5))


def attribute(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    vector = peft_aso.compute_attribution(model, batch, adapter="mood", steps=20)
    assert_type(vector, AttributionVector)
    assert_type(vector.scores, torch.Tensor)
    assert_type(vector.layout, list[tuple[str, int, int]])
    assert_type(similarity_matrix(vector.scores), torch.Tensor)
    return peft_aso.similarity(vector.scores, vector.scores, method="spearman")


def coefficients(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    assert_type(peft_aso.update_coefficients(model, batches), Coefficients)


def chain(base: nn.Module, folder: Path) -> None:
    model: Any = peft_aso.load_chain(base, folder, tasks=["mood"], trainable=True)
    model = peft_aso.load_chain(base, ["user/mood", folder])
    model = peft_aso.load_history(base, "user/plain-lora", name="plain")
    assert_type(peft_aso.push_chain(model, "user/chain", accuracy={"mood": 72.5}), dict[str, str])
    assert_type(peft_aso.export_lora(model, folder / "served", max_rank=64), Path)
    assert_type(peft_aso.export_merged(model, folder / "merged", dtype=torch.bfloat16), Path)
    peft_aso.save_chain(model, folder)
    peft_aso.remove_task(model, "mood")
    peft_aso.update_task(model, "mood", "user/chain")


def measures(matrix: list[list[float | None]], alone: list[float]) -> list[float]:
    before = [average_accuracy(matrix), backward_transfer(matrix)]
    return [*before, forgetting(matrix, stage=1), forward_transfer(matrix, alone)]


class Trainer(peft_aso.ASOTrainer):
    """A subclass, as users write them."""


def train(model: nn.Module, args: Any, dataset: Any) -> None:
    Trainer(model=model, args=args, train_dataset=dataset).train()
    peft_aso.ASOSeq2SeqTrainer(model=model, args=args, train_dataset=dataset).train()
    peft_aso.ASOSFTTrainer(model=model, args=args, train_dataset=dataset).train()
