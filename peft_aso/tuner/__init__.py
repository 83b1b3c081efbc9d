"""The tuner: LoRA adapters with a history, inside PEFT's own API."""

from ..attribution.config import AttributionConfig
from .config import ASOLoraConfig
from .history import HistoryError, MissingHistoryError
from .low_rank import MERGES, LowRank, MissingInputsError, register_merge
from .model import ASOLoraModel
from .penalties import register_penalty
from .starts import register_start

__all__ = [
    "MERGES",
    "ASOLoraConfig",
    "ASOLoraModel",
    "AttributionConfig",
    "HistoryError",
    "LowRank",
    "MissingHistoryError",
    "MissingInputsError",
    "register_merge",
    "register_penalty",
    "register_start",
]
