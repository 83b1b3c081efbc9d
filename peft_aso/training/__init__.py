"""Training a task: attribution turned into coefficients, and the Trainer that adds the penalty to the loss."""

from .attribution import compute_attribution
from .coefficients import Coefficients, update_coefficients
from .inputs import initialize_from_inputs
from .trainer import ASOSeq2SeqTrainer, ASOTrainer, ASOTrainerMixin

__all__ = [
    "ASOSeq2SeqTrainer",
    "ASOTrainer",
    "ASOTrainerMixin",
    "Coefficients",
    "compute_attribution",
    "initialize_from_inputs",
    "update_coefficients",
]
