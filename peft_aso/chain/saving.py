"""Save a chain of tasks into one folder, all of it or nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..tuner import ASOLoraModel
from ..tuner.history import is_free, name_parts, task_name_of
from .atomic import replaced_folder
from .beside import beside
from .errors import ChainError
from .export import README_NAME
from .manifest import Listing, describe, read_listing, write_manifest
from .order import in_order
from .reading import check_task_name, read_adapter
from .removing import adapter_named, was_replaced

PEFT_DEFAULT = "default"  # the adapter that PEFT saves in the folder itself


def save_chain(model: Any, folder: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> Path:
    """Save tasks with their history, one subfolder a task, and `chain.json` (their order, fingerprints).

    All is written beside `folder` first and takes its place in one step, so that an error or a killed process
    leaves what was there. Other files and folders in it are kept, a README.md too, but for the folders of tasks that
    `remove_task` took out of this model. The chain is then what was saved now, and those tasks of the chain that lay
    there which were trained on top of it, with these weights; other adapters stay on the disk, and `load_chain` leaves
    them out.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        folder: where to; it is made if it does not exist.
        tasks: which tasks (their history must be among them). None: all but the products of
            `add_weighted_adapter`.

    Returns:
        The folder.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, a task without its
            history, a name that `load_chain` would refuse.
        OSError: the disk is full or cannot be written to; what was there is as it was.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ASOLoraModel):
        raise ChainError("save_chain needs a PeftModel with ASO_LORA adapters (get_peft_model with an ASOLoraConfig).")
    adapters = _selected(model, tasks)
    path = Path(folder)
    if (path / CONFIG_NAME).exists():
        raise ChainError(
            f"{path} is itself the folder of an adapter: a chain in it would be read together with that "
            "adapter. Give another folder."
        )
    earlier = _listed_before(path)
    gone = _removed(model, earlier, adapters)
    with replaced_folder(path, without=gone) as stage:
        written = []
        for task, adapter in adapters.items():
            _write_adapter(model, adapter, stage, task)
            written.append(read_adapter(stage / task))
        entries = {adapter.name: describe(adapter, adapter.path.name, adapter.weights()) for adapter in written}
        staying, left_out = beside(path, earlier, {task: each["sha256"] for task, each in entries.items()}, gone)
        entries.update({adapter.name: earlier.tasks[adapter.name] for adapter in staying})
        ordered = [entries[adapter.name] for adapter in in_order([*staying, *written])]  # what was saved now is newest
        names = [adapter.config.base_model_name_or_path for adapter in written]
        exports = [export for export in earlier.exports if (path / export).is_dir() and export not in adapters]
        write_manifest(stage, ordered, next(filter(None, names), None), exports, left_out)
        if (path / README_NAME).exists():  # somebody may have written in it
            (stage / README_NAME).unlink(missing_ok=True)
    return path


def _listed_before(folder: Path) -> Listing:
    """What the folder's manifest says now; nothing where it cannot be read, for a new one takes its place."""
    try:
        found = read_listing(folder)
    except ChainError as error:
        warnings.warn(f"What was listed in {folder} is not known any more: {error}", stacklevel=3)
        found = None
    return found or Listing({}, [], {}, None)


def _removed(model: Any, earlier: Listing, tasks: Collection[str]) -> list[str]:
    """The folders of tasks that `remove_task` took out of this model."""
    listed = earlier.tasks.items()
    gone = [entry for task, entry in listed if task not in tasks and was_replaced(model, task, entry)]
    return [str(entry["folder"]) for entry in gone if "repo_id" not in entry]


def _selected(model: Any, tasks: Sequence[str] | None) -> dict[str, str]:
    """Task -> adapter, of the tasks to be saved; checked to be complete."""
    configs = model.peft_config
    if tasks is None:
        names = [name for name, config in configs.items() if not config.combined]
    else:
        names = [adapter_named(task, configs) for task in ([tasks] if isinstance(tasks, str) else tasks)]
    if not names:
        raise ChainError(f"There is no task to save. The model holds: {', '.join(map(repr, configs))}.")
    selected = {task_name_of(name, configs[name]): name for name in names}
    if len(selected) < len(names):
        raise ChainError(
            f"Two of the adapters {names} have the same task_name, or one is named twice. Save one of them."
        )
    taken = name_parts(model.base_model.model) - set(configs)
    for task, name in selected.items():
        check_task_name(task, Path(f"The adapter {name!r}"))
        if not is_free(task, taken):
            raise ChainError(
                f"The adapter {name!r} holds the task {task!r}, and load_chain could not call an adapter so: the name "
                "has a dot, or is a part of the model's own parameter names. Set another task_name in "
                f"model.peft_config[{name!r}], and in the history of the tasks after it."
            )
        lacking = [old for old in configs[name].history or [] if old not in selected]
        if lacking:
            raise ChainError(
                f"{task!r} was trained on top of {', '.join(map(repr, lacking))}, which would not be in the "
                "folder. Save them together (tasks=None saves all), loading them first if need be."
            )
    return selected


def _write_adapter(model: Any, adapter: str, stage: Path, task: str) -> None:
    """Save one adapter as PEFT does (in a folder by the adapter's name) and move it to its task's folder."""
    scratch = stage / ".saving"
    model.save_pretrained(str(scratch), selected_adapters=[adapter])
    written = scratch if adapter == PEFT_DEFAULT else scratch / adapter
    written.rename(stage / task)
    if scratch.exists():
        (scratch / README_NAME).rename(stage / README_NAME)
        scratch.rmdir()
