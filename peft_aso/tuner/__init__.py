"""The tuner: LoRA adapters with a history, inside PEFT's own API."""

from ..attribution.config import AttributionConfig
from .config import ASOLoraConfig
from .history import HistoryError, MissingHistoryError, TaskHistory
from .model import ASOLoraModel

__all__ = [
    "ASOLoraConfig",
    "ASOLoraModel",
    "AttributionConfig",
    "HistoryError",
    "MissingHistoryError",
    "TaskHistory",
]
