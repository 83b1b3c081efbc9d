"""The tuner: LoRA adapters with a history, inside PEFT's own API."""

from ..attribution.config import AttributionConfig
from .config import ASOLoraConfig
from .history import HistoryError, MissingHistoryError
from .low_rank import LowRank, register_merge
from .model import ASOLoraModel
from .penalties import register_penalty
from .starts import register_start

__all__ = [
    "ASOLoraConfig",
    "ASOLoraModel",
    "AttributionConfig",
    "HistoryError",
    "LowRank",
    "MissingHistoryError",
    "register_merge",
    "register_penalty",
    "register_start",
]
