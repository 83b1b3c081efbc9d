"""peft-aso: a language model learns task after task, each with its own LoRA adapter, without forgetting.

Importing the package registers the tuner type ASO_LORA with PEFT.
"""

from __future__ import annotations

__version__ = "0.1.0"

from .registration import register
from .tuner import ASOLoraConfig, ASOLoraModel, AttributionConfig, HistoryError, MissingHistoryError

register()

__all__ = [
    "ASOLoraConfig",
    "ASOLoraModel",
    "AttributionConfig",
    "HistoryError",
    "MissingHistoryError",
]
