"""Training a task: attribution turned into coefficients, and the Trainer that adds the penalty to the loss."""

from .coefficients import Coefficients, compute_attribution, update_coefficients
from .inputs import initialize_from_inputs, update_input_memory
from .trainer import ASOSeq2SeqTrainer, ASOTrainer, ASOTrainerMixin

__all__ = [
    "ASOSeq2SeqTrainer",
    "ASOTrainer",
    "ASOTrainerMixin",
    "Coefficients",
    "compute_attribution",
    "initialize_from_inputs",
    "update_coefficients",
    "update_input_memory",
]
