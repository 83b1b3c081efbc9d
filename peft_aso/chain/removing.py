"""Take a task out of a chain again: the model is the sum without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from ..tuner import ASOLoraModel
from ..tuner.history import adapter_of, task_name_of
from .errors import ChainError
from .manifest import weights_hash


def remove_task(model: Any, task: str) -> None:
    """Take a task out of a chain: its adapter goes, and so does its name from every other task's history.

    The other tasks' adapters stay as they are. Those that were learned after it were trained with it in the forward
    pass: test them. `save_chain` into the chain's folder and `push_chain` into its repository take it out there
    too, if they are called with this model.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        task: which one, by its own or its adapter's name. If it is the active one, the task before it is active
            afterwards.

    Raises:
        ChainError: before the model is touched: another kind of model, no such task, no other one, or merged adapters.
    """
    name = adapter_for(model, task)
    refuse_merged(model)
    task = task_name_of(name, model.peft_config[name])
    tuner: ASOLoraModel = model.base_model
    if len(model.peft_config) == 1:
        raise ChainError(f"{task!r} is the only task. model.unload() returns the base model.")
    note_replaced(model, task, name)
    active = list(tuner.active_adapters)
    for adapter, config in model.peft_config.items():
        if config.history and task in config.history:
            config.history = [old for old in config.history if old != task]
            config.similarities = _without(config.similarities, task)
            config.soft_coefficients = _without(config.soft_coefficients, task)
            tuner.forget_soft_coefficients(adapter)
    tuner.tasks.refresh(model.peft_config)
    if active != [name]:
        tuner.set_adapter(active)
    model.delete_adapter(name)


def adapter_for(model: Any, task: str) -> str:
    """The adapter that holds a task.

    Raises:
        ChainError: another kind of model, or no such task.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ASOLoraModel):
        raise ChainError("This needs a PeftModel with ASO_LORA adapters.")
    return adapter_named(task, model.peft_config)


def adapter_named(task: str, configs: Mapping[str, Any]) -> str:
    """The adapter that holds a task, by the model's configs.

    Raises:
        ChainError: no such task.
    """
    name = adapter_of(task, configs)
    if name is None:
        tasks = ", ".join(repr(task_name_of(adapter, config)) for adapter, config in configs.items())
        raise ChainError(f"There is no task {task!r} in the model. There are: {tasks}.")
    return name


def refuse_merged(model: Any) -> None:
    """Refuse a model whose base weights hold adapters: what they were merged with could not be taken out again.

    Raises:
        ChainError: an adapter is merged.
    """
    if model.base_model.is_merged:
        raise ChainError("Adapters are merged into the base weights. Call model.unmerge_adapter() first.")


def note_replaced(model: Any, task: str, name: str) -> None:
    """Remember that these weights were taken out on purpose, so that they may go on disk and on the Hub too."""
    model.base_model.replaced.setdefault(task, set()).add(hash_in(model, name))


def hash_in(model: Any, name: str) -> str:
    """The `weights_hash` of an adapter in the model: what its entry has when it is saved."""
    return weights_hash(get_peft_model_state_dict(model, adapter_name=name))


def was_replaced(model: Any, task: str, entry: Mapping[str, Any]) -> bool:
    """Whether the weights of a manifest's entry were taken out of this model on purpose."""
    return entry["sha256"] in model.base_model.replaced.get(task, ())


def _without(values: dict[str, Any] | None, task: str) -> dict[str, Any] | None:
    return None if values is None else {old: value for old, value in values.items() if old != task}
