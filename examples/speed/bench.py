"""What every line is given: the model, the sizes and where to write."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .adapters import AdapterFolder
from .models import Subject


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are the table's."""

    repeats: int = 5
    batch: int = 8  # of a training step
    tokens: int = 64
    rank: int = 8
    tasks: int = 100
    loop_tasks: int = 15  # T of the O-LoRA loop and of the whole task
    growth_tasks: tuple[int, ...] = (2, 15, 50, 100)
    growth_ranks: tuple[int, ...] = (4, 8, 16, 32)
    growth_tokens: tuple[int, ...] = (16, 64, 128, 256, 512)
    growth_layers: tuple[int, ...] = (6, 12, 18, 24, 30)
    examples: int = 8  # of an attribution
    prompt: int = 128
    encoder_tokens: int = 64
    steps: int = 20
    captum_layers: int | None = 5  # None: all
    neurons: int = 352_256
    vectors: int = 100
    reference_steps: int = 512
    riemann: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 20, 32, 64)
    gauss: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 20)
    adaptive: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)  # 1 / tolerance
    path_points: int = 65
    quadrature_examples: int = 4
    task_examples: int = 500
    task_tokens: int = 130
    task_batch: int = 16
    task_repeats: int = 1
    probe: int = 16
    probe_examples: int = 64  # of each task, for the size of a probe
    peak: int = 3072  # side of the square matrices of the machine's peak


QUICK = Sizes(
    repeats=1, batch=2, tokens=16, tasks=4, loop_tasks=3, growth_tasks=(2, 3), growth_ranks=(2, 4),
    growth_tokens=(8, 16), growth_layers=(1, 2), examples=4, prompt=12, encoder_tokens=12, captum_layers=2,
    neurons=3000, vectors=8, reference_steps=40, riemann=(1, 20), gauss=(1, 3, 5), adaptive=(1, 20),
    path_points=5, quadrature_examples=2, task_examples=12, task_tokens=14, task_batch=4, probe=2, probe_examples=4,
    peak=256,
)  # fmt: skip


def sizes_from(options: Any) -> Sizes:
    """The table's sizes (or the quick ones), with what the command line gives by name."""
    given = {each.name: getattr(options, each.name, None) for each in fields(Sizes)}
    chosen = {name: value for name, value in given.items() if value is not None}
    if getattr(options, "captum_layers", None) == "all":
        chosen["captum_layers"] = None
    return replace(QUICK if options.quick else Sizes(), **chosen)


@dataclass
class Bench:
    """One model's run.

    Attributes:
        subject: the model.
        sizes: how large everything is.
        scratch: a folder for files that nobody needs afterwards.
        out: the folder for pictures and tables.
        options: the command line.
    """

    subject: Subject
    sizes: Sizes
    scratch: Path
    out: Path
    options: Any
    _adapters: dict[int, AdapterFolder] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.subject.model.device)

    @property
    def exact(self) -> bool:
        """Whether the model is in float32: half types round differently on each way."""
        return bool(self.subject.model.dtype == torch.float32)

    @property
    def logits_limit(self) -> float:
        """How far two ways may be apart in the logits, as a part of the largest."""
        return 1e-4 if self.exact else 5e-2

    def adapters(self, rank: int | None = None) -> AdapterFolder:
        """The random adapters of one rank."""
        rank = rank or self.sizes.rank
        if rank not in self._adapters:
            name = f"{self.subject.name.replace('/', '_')}-{rank}"
            self._adapters[rank] = AdapterFolder(self.scratch / name, self.subject, rank)
        return self._adapters[rank]

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.perf_counter() - self._started:7.1f} s] {self.subject.label}: {text}", flush=True)
