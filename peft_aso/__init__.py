"""peft-aso: a language model learns task after task, each with its own LoRA adapter, without forgetting.

Importing the package registers the tuner type ASO_LORA with PEFT.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

from . import metrics, plots
from .attribution import AttributionVector, similarity
from .chain import (
    ChainError,
    export_lora,
    export_merged,
    load_chain,
    load_history,
    push_chain,
    remove_task,
    save_chain,
    update_task,
)
from .registration import register
from .training import (
    ASOSeq2SeqTrainer,
    ASOTrainer,
    ASOTrainerMixin,
    Coefficients,
    compute_attribution,
    initialize_from_inputs,
    update_coefficients,
    update_input_memory,
)
from .tuner import (
    MERGES,
    ASOLoraConfig,
    ASOLoraModel,
    AttributionConfig,
    HistoryError,
    LowRank,
    MissingHistoryError,
    MissingInputsError,
    register_merge,
    register_penalty,
    register_start,
)

register()


def __getattr__(name: str) -> Any:
    """`ASOSFTTrainer`, which needs TRL, is looked for when it is asked for."""
    if name == "ASOSFTTrainer":
        from .training.trainer import ASOSFTTrainer

        return ASOSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MERGES",
    "ASOLoraConfig",
    "ASOLoraModel",
    "ASOSeq2SeqTrainer",
    "ASOTrainer",
    "ASOTrainerMixin",
    "AttributionConfig",
    "AttributionVector",
    "ChainError",
    "Coefficients",
    "HistoryError",
    "LowRank",
    "MissingHistoryError",
    "MissingInputsError",
    "compute_attribution",
    "export_lora",
    "export_merged",
    "initialize_from_inputs",
    "load_chain",
    "load_history",
    "metrics",
    "plots",
    "push_chain",
    "register_merge",
    "register_penalty",
    "register_start",
    "remove_task",
    "save_chain",
    "similarity",
    "update_coefficients",
    "update_input_memory",
    "update_task",
]
