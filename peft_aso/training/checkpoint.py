"""Checkpoints of a training run: the current task alone.

PEFT's `save_pretrained` would write the whole history at each checkpoint, into subfolders in which the Trainer does
not look for its best model. Here the current task's adapter lies in the checkpoint's root; its config has psi.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .coefficients import layers_of_modules, require_tuner


def save_current_task(model: Any, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write the current task's adapter and config into `folder`, beside first and then renamed.

    Args:
        model: the PEFT model.
        folder: the checkpoint folder; made if it is not there.
        state_dict: the model's gathered state dict where the weights are sharded.
    """
    tuner = require_tuner(model)
    task = tuner.current_task
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=task)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    beside = folder / f"{SAFETENSORS_WEIGHTS_NAME}.part"
    save_file(tensors, beside, metadata={"format": "pt"})
    os.replace(beside, folder / SAFETENSORS_WEIGHTS_NAME)
    config = tuner.peft_config[task]
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = tuner.model.__dict__.get("name_or_path") or None
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training


def check_checkpoint(model: Any, folder: str | Path) -> PeftConfig:
    """The config in a checkpoint, if it is one of the current task's.

    Raises:
        ValueError: the checkpoint is of another task or another history.
    """
    tuner = require_tuner(model)
    own = tuner.peft_config[tuner.current_task]
    saved = PeftConfig.from_pretrained(str(folder))
    saved_is = (getattr(saved, "task_name", None), getattr(saved, "history", None))
    if saved_is != (own.task_name, own.history):
        raise ValueError(
            f"The checkpoint {folder} is of task {saved_is[0]!r} with history {saved_is[1]}, and the current task is "
            f"{own.task_name!r} with history {own.history}. Give each task an output_dir of its own, or activate the "
            "task that the checkpoint belongs to."
        )
    return saved


def restore_coefficients(model: Any, folder: str | Path) -> bool:
    """Set psi as it stood when the checkpoint was written. False if the checkpoint has none.

    It cannot be computed again on resuming: it came from the weights of an earlier step.
    """
    tuner = require_tuner(model)
    own: Any = tuner.peft_config[tuner.current_task]
    saved: Any = check_checkpoint(model, folder)
    if not tuner.history or not saved.soft_coefficients:
        return False
    own.attribution_layout = saved.attribution_layout
    tuner.set_soft_coefficients(saved.soft_coefficients, layers_of_modules(tuner, own), saved.similarities)
    return True
