"""Save a chain of tasks into a folder, and take a task out of a chain.

`chain.json` is the commit record: a task that is new or has changed is written into a new folder, `chain.json`
is replaced in one step, and only then what it no longer names is removed. A killed process leaves the old chain or
the new one, complete, and what else it leaves the next save removes. The folder itself is never moved.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from tqdm.auto import tqdm

from ..tuner import ASOLoraModel
from ..tuner.adapter_file import weights_hash
from ..tuner.history import adapter_of, is_free, name_parts, oldest_first, task_name_of
from .manifest import (
    MANIFEST_NAME,
    README_NAME,
    ROOT,
    AdapterFile,
    ChainError,
    Manifest,
    Place,
    check_task_name,
    flush,
    hub_id,
    read_adapter,
    read_manifest,
    staging,
    write_manifest,
)

EXPORT = "merged"  # the folder of the sum of all tasks
PICTURE = "similarity.png"
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_PEFT_DEFAULT = "default"  # the adapter that PEFT saves in the folder itself
_TAGS = ["continual-learning", "lora", "peft", "peft-aso", "aso-lora"]
_OWN_CARD = "<!-- Written by peft-aso, again at each save. Take this line out to have a text of your own. -->"


def save_chain(
    model: Any, folder: str | os.PathLike[str], tasks: Sequence[str] | None = None, *, overwrite: bool = False
) -> Path:
    """Save tasks with their history, a subfolder for each, `chain.json` (their order and hashes), and a README.md.

    Tasks that have not changed since they were saved stay where they are. Everything else in the folder that
    `chain.json` did not name stays too, and so does a README.md of somebody else. A process that is killed leaves the
    old chain or the new one. Of two that save at once the second waits (on Windows and NFS one of them may fail).

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        folder: where to; it is made if it does not exist, and returned.
        tasks: which tasks (their history must be among them). None: all but the products of `add_weighted_adapter`.
        overwrite: whether tasks that the folder's `chain.json` lists, and that are not saved now, are removed.
            `remove_task` allows it for its task.

    Raises:
        ChainError: before anything is written: another kind of model, an unknown task, a task without its history, a
            name that `load_chain` would refuse, a folder that lists other tasks.
        OSError: the disk is full or cannot be written to; the old chain is as it was.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ASOLoraModel):
        raise ChainError("save_chain needs a PeftModel with ASO_LORA adapters (get_peft_model with an ASOLoraConfig).")
    adapters, path = _selected(model, tasks), Path(folder)
    if (path / CONFIG_NAME).exists():
        raise ChainError(f"{path} is the folder of an adapter. Give another folder for the chain.")
    hashes = {task: model.base_model.adapter_hash(adapter) for task, adapter in adapters.items()}
    for task, adapter in adapters.items():  # each config names its history as it is saved
        trained_on = model.peft_config[adapter].history_hashes or {}
        changed = {old: hashes[old] for old, digest in trained_on.items() if hashes[old] != digest}
        if changed:
            model.peft_config[adapter].history_hashes = {**trained_on, **changed}
            names = ", ".join(map(repr, changed))
            text = f"{task!r} was trained on top of other weights of {names} than are saved now (of another dtype?)."
            warnings.warn(f"{text} Its config gets the new hashes.", stacklevel=2)
    bases = [model.peft_config[name].base_model_name_or_path for name in adapters.values()]
    with staging(path) as stage:
        try:
            earlier = read_manifest(path) or Manifest({})
        except ChainError as error:
            if not overwrite:
                raise ChainError(f"{error} Or pass overwrite=True to write a new {MANIFEST_NAME}.") from error
            earlier = Manifest({})
        refuse_loss(earlier, adapters, model.base_model.removed_tasks, overwrite, str(path))
        entries, new = {}, {}
        bar = tqdm(adapters.items(), desc="Saving the chain", unit="task", leave=False, disable=len(adapters) < 5)
        for task, adapter in bar:
            scratch, made = stage / ".scratch", stage / task
            model.save_pretrained(str(scratch), selected_adapters=[adapter])
            (scratch if adapter == _PEFT_DEFAULT else scratch / adapter).rename(made)
            shutil.rmtree(scratch, ignore_errors=True)
            (made / README_NAME).unlink(missing_ok=True)  # PEFT's model card
            written = read_adapter(Place(made))
            digest = weights_hash(written.tensors(), written.config)
            target, is_there = _target(path, written, digest, earlier)
            if not is_there:
                new[written.place.path] = target
            config = written.config
            entries[task] = {
                "task": task, "folder": target.name, "history": written.history, "rank": config.r, "sha256": digest,
                "similarities": config.similarities, "soft_coefficients": config.soft_coefficients,
            }  # fmt: skip
        order = oldest_first({task: entry["history"] for task, entry in entries.items()})
        manifest = Manifest({task: entries[task] for task in order}, next(filter(None, bases), None))
        listed = {entry["folder"] for entry in earlier.tasks.values() if "repo_id" not in entry}
        old = {*listed, *earlier.unfinished} - {entry["folder"] for entry in entries.values()} - {ROOT}
        unfinished = sorted({*old, *(target.name for target in new.values())})  # for the next save, if this one dies
        flush(stage)
        write_manifest(path, earlier._replace(unfinished=unfinished), stage)
        for source, target in new.items():
            os.rename(source, target)
        write_manifest(path, manifest._replace(unfinished=unfinished), stage)
        for name in old:
            shutil.rmtree(path / name, ignore_errors=True)
        write_manifest(path, manifest, stage)
        readme = path / README_NAME
        if not readme.exists() or _OWN_CARD in readme.read_text(encoding="utf-8", errors="replace"):
            model_card(path.resolve().name, path, manifest, model).save(stage / README_NAME)
            os.replace(stage / README_NAME, readme)
    return path


def remove_task(model: Any, task: str) -> None:
    """Take a task out of a chain: its adapter goes, and so does its name from every other task's history.

    The other tasks' adapters stay as they are. Those that were learned after it were trained with it in the forward
    pass: test them. `save_chain` into the chain's folder and `push_chain` into its repository remove it there too.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        task: which one, by its own or its adapter's name. If it is the active one, the task before it is active
            afterwards.

    Raises:
        ChainError: before the model is touched: another kind of model, no such task, no other one, or merged adapters.
    """
    name = adapter_for(model, task)
    task = task_name_of(name, model.peft_config[name])
    tuner: ASOLoraModel = model.base_model
    if len(model.peft_config) == 1:
        raise ChainError(f"{task!r} is the only task. model.unload() returns the base model.")
    active = list(tuner.active_adapters)
    for config in model.peft_config.values():
        if config.history and task in config.history:
            config.history = [old for old in config.history if old != task]
            for field in ("similarities", "soft_coefficients", "history_hashes"):
                values = getattr(config, field)
                setattr(config, field, values and {old: value for old, value in values.items() if old != task})
    tuner.refresh_history()
    if active != [name]:
        tuner.set_adapter(active)
    model.delete_adapter(name)
    tuner.removed_tasks.add(task)


def adapter_for(model: Any, task: str) -> str:
    """The adapter that holds a task which is to be changed; `ChainError` if there is none, or adapters are merged."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ASOLoraModel):
        raise ChainError("This needs a PeftModel with ASO_LORA adapters.")
    if model.base_model.is_merged:
        raise ChainError("Adapters are merged into the base weights. Call model.unmerge_adapter() first.")
    return _adapter_named(task, model.peft_config)


def _adapter_named(task: str, configs: Mapping[str, Any]) -> str:
    name = adapter_of(task, configs)
    if name is None:
        tasks = ", ".join(repr(task_name_of(adapter, config)) for adapter, config in configs.items())
        raise ChainError(f"There is no task {task!r} in the model. There are: {tasks}.")
    return name


def refuse_loss(
    earlier: Manifest, saved: Collection[str], removed: Collection[str], overwrite: bool, where: str
) -> None:
    """Refuse to drop tasks that a `chain.json` lists, but for those that were removed on purpose."""
    lost = [task for task in earlier.tasks if task not in saved and task not in removed]
    if lost and not overwrite:
        names = ", ".join(map(repr, lost))
        raise ChainError(f"{where} holds {names}, which would be lost: nothing was written. Or pass overwrite=True.")


def _selected(model: Any, tasks: Sequence[str] | None) -> dict[str, str]:
    """Task -> adapter, of the tasks to be saved; checked to be complete."""
    configs = model.peft_config
    if tasks is None:
        names = [name for name, config in configs.items() if not config.combined]
    else:
        names = [_adapter_named(task, configs) for task in ([tasks] if isinstance(tasks, str) else tasks)]
    if not names:
        raise ChainError(f"There is no task to save. The model holds: {', '.join(map(repr, configs))}.")
    selected = {task_name_of(name, configs[name]): name for name in names}
    if len(selected) < len(names):
        raise ChainError(f"Two of the adapters {names} hold the same task, or one is named twice. Save one of them.")
    taken = name_parts(model.base_model.model) - set(configs)
    for task, name in selected.items():
        check_task_name(task, f"The adapter {name!r}")
        if not is_free(task, taken):
            raise ChainError(
                f"{task!r} has a dot, or is a part of the model's names. Set another task_name in its config."
            )
        lacking = [old for old in configs[name].history or [] if old not in selected]
        if lacking:
            old = ", ".join(map(repr, lacking))
            raise ChainError(f"{task!r} was trained on top of {old}, which would not be there. Save them together.")
    return selected


def _target(path: Path, written: AdapterFile, digest: str, earlier: Manifest) -> tuple[Path, bool]:
    """The folder for a task, and whether the same bytes with the same config are in it already."""
    task = written.name
    known = earlier.tasks.get(task, {"repo_id": None})
    names = [task, f"{task}-{digest[:8]}"]
    if "repo_id" not in known and (path / known["folder"]).exists():
        names.insert(0, known["folder"])
    for place in (path / name for name in names):
        if not os.path.lexists(place):
            return place, False
        with suppress(ChainError, OSError):
            there = read_adapter(Place(place))
            old, new = (each.place.path / SAFETENSORS_WEIGHTS_NAME for each in (there, written))
            if there.config.to_dict() == written.config.to_dict() and filecmp.cmp(old, new, shallow=False):
                return place, True
    raise ChainError(f"There is no free name for the task {task!r} in {path}. Save the chain into another folder.")


def model_card(
    name: str, folder: Path, manifest: Manifest, model: Any, accuracy: Mapping[str, float] | None = None
) -> ModelCard:
    """README.md of a chain: what it is, how to load it and how to go on with it; `accuracy` of tasks is in percent.

    `name` is that of the repository or the folder, and `folder` where the other files are. The name of a base model
    that is a folder of this machine is left out.
    """
    base, newest = hub_id(manifest.base_model), model.peft_config[adapter_of([*manifest.tasks][-1], model.peft_config)]
    kind = getattr(newest.task_type, "value", newest.task_type)
    own_class = type(model.base_model.model).__name__
    loader = AUTO_CLASSES.get(kind, own_class if hasattr(transformers, own_class) else "AutoModel")
    about = ModelCardData(base_model=base, base_model_relation="adapter", library_name="peft", tags=_TAGS)
    load_base = f'{loader}.from_pretrained("{base or "the base model"}")'
    rows = [["", "task", "rank", "most like (w)", "accuracy", "weights"]]
    for number, (task, entry) in enumerate(manifest.tasks.items(), start=1):
        weights = f"`{entry['sha256'][:12]}`"
        if "repo_id" in entry:
            weights += f" of [{entry['repo_id']}](https://huggingface.co/{entry['repo_id']}/tree/{entry['revision']})"
        percent = f"{accuracy[task]:.1f}" if accuracy and task in accuracy else ""
        rows.append([str(number), task, str(entry["rank"]), most_like(entry["similarities"]), percent, weights])
    parts = [
        f"---\n{about.to_yaml()}\n---\n\n# {name}",
        f"A chain of {len(manifest.tasks)} tasks, learned one after another with ASO-LoRA "
        "([peft-aso](https://pypi.org/project/peft-aso/), [paper](https://aclanthology.org/2026.acl-long.842/)). Each "
        "task has its own LoRA adapter; the model is the base and the sum of all. The adapters need the package (PEFT "
        "alone says `KeyError: 'ASO_LORA'`): `pip install peft-aso`.",
        markdown(rows),
        f"""```python
from peft_aso import ASOLoraConfig, load_chain, push_chain
from transformers import {loader}

model = load_chain({load_base}, "{name}")  # all tasks
model.add_adapter("new-task", ASOLoraConfig({f'task_type="{kind}"' if kind else ""}))
model.set_adapter("new-task")  # the tasks above are its history; train it with ASOTrainer, then
push_chain(model, "you/new-chain")
```""",
    ]
    if (folder / EXPORT / README_NAME).exists():
        load = f'PeftModel.from_pretrained({load_base}, "{name}", subfolder="{EXPORT}")'
        parts.append(f"Without peft-aso: `{EXPORT}/` is one stock LoRA adapter, all tasks merged: `{load}`.")
    if (folder / PICTURE).exists():
        parts.append(f"![similarity of the tasks]({PICTURE})")
    return ModelCard("\n\n".join([*parts, _OWN_CARD]) + "\n", ignore_metadata_errors=False)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of one width; the first row is its head."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in lines
    )


def most_like(values: Mapping[str, Any] | None) -> str:
    """The earlier task with the largest w or psi, and that (a mean, if each layer has its own); empty if none has."""
    means = {task: sum(w) / max(len(w), 1) if isinstance(w, list) else float(w) for task, w in (values or {}).items()}
    best = max(means, key=means.__getitem__, default=None)
    return "" if best is None else f"{best} ({means[best]:.2f})"
