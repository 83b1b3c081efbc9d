"""The methods, by the names that the command line has for them. To add one: write its file, and name it here."""

from __future__ import annotations

from .adapters import ASOLoRA, IncLoRA, OLoRA
from .alone import PerTaskFT, PerTaskLoRA
from .base import Method
from .ewc import EWC
from .lwf import LwF
from .osf import OSF
from .replay import Replay
from .sequential import SeqFT, SeqLoRA

METHODS: dict[str, type[Method]] = {
    "aso_lora": ASOLoRA,
    "o_lora": OLoRA,
    "inc_lora": IncLoRA,
    "seq_lora": SeqLoRA,
    "seq_ft": SeqFT,
    "per_task_lora": PerTaskLoRA,
    "per_task_ft": PerTaskFT,
    "replay": Replay,
    "ewc": EWC,
    "lwf": LwF,
    "osf": OSF,
}

__all__ = ["METHODS", "Method"]
