"""`ASOSFTTrainer`: TRL's trainer for prompts and completions, with the orthogonality penalty. Needs TRL."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError('ASOSFTTrainer needs TRL: pip install "peft-aso[trl]"') from error

from .trainer import ASOTrainerMixin


class ASOSFTTrainer(ASOTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with the orthogonality penalty, for a PEFT model whose active adapter is the task to train.

    Datasets are TRL's: prompt and completion, as text or as conversations. The answer, whose tokens the loss and the
    attribution look at, is the completion (`completion_only_loss`, TRL's default for such data), or what the assistant
    says (`assistant_only_loss=True`).

    Args:
        model: a `PeftModel` with ASO_LORA adapters. Not a name, and no `peft_config` beside it: the chain is made with
            `get_peft_model`, `load_chain` and `add_adapter`.

    Raises (on construction, before any work):
        ValueError: a `peft_config`, packing or padding-free batches, whose rows hold several examples each; or as
            `ASOTrainerMixin`.
    """

    def __init__(self, model: Any, args: Any = None, *more: Any, **keywords: Any) -> None:
        if keywords.get("peft_config") is not None:
            raise ValueError(
                "peft_config would make an adapter without a name or a history. Make the model with "
                "get_peft_model(base, ASOLoraConfig(...), adapter_name=...), or add the task with model.add_adapter."
            )
        if args is not None and (args.packing or args.padding_free):
            raise ValueError(
                "packing and padding_free put several examples into one row, which attribution cannot tell apart. "
                "Leave both off."
            )
        super().__init__(model, args, *more, **keywords)

    def _counts_items(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        """TRL's loss keeps a record of the passes, to which these do not belong."""
        record = {name: copy.deepcopy(self.__dict__[name]) for name in ("_metrics", "_total_train_tokens")}
        found = super()._counts_items(model, inputs, count)
        self.__dict__.update(record)
        return found
