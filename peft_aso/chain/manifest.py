"""A chain on the disk: `chain.json` and one folder per adapter, read without trusting what is in them.

Only safetensors and JSON are read; links that lead out of a folder are refused. Nothing here touches a model.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..tuner.adapter_file import is_finite, weights_hash
from ..tuner.config import PEFT_TYPE_NAME, ASOLoraConfig
from ..tuner.history import is_folder_name

MANIFEST_NAME = "chain.json"
FORMAT, FORMAT_VERSION = "peft_aso chain", 2
ROOT = "."  # the folder of a task that lies next to its chain.json
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEMPORARY = ".peft-aso-"  # beginning of the names of temporary folders
_LARGEST_JSON = 16 * 2**20


class ChainError(ValueError):
    """A chain of tasks cannot be read, loaded, saved or exported. The message tells why and what to do."""


def warn_or_raise(message: str, strict: bool) -> None:
    """A `ChainError` if strict, else a warning."""
    if strict:
        raise ChainError(f"{message} Or pass strict=False.")
    warnings.warn(message, stacklevel=4)


# ---- chain.json -------------------------------------------------------------------------------------------------


class Manifest(NamedTuple):
    """What `chain.json` holds.

    Attributes:
        tasks: task -> its entry, in the order in which the tasks were learned: `task`, `folder`, `history`, `rank`,
            `sha256` (`weights_hash` with the config), `similarities`, `soft_coefficients`; of a task in another
            repository `repo_id` and `revision`; of format version 1 `scale`, which its `sha256` does not have.
        base_model: the base model's name.
        unfinished: folders that a save is adding or removing; if it is killed, the next one removes them.
    """

    tasks: dict[str, dict[str, Any]]
    base_model: str | None = None
    unfinished: Sequence[str] = ()


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's `chain.json`; None if there is none.

    Raises:
        ChainError: it is damaged, of a newer format, or names folders outside of its own.
    """
    if not os.path.lexists(folder / MANIFEST_NAME):
        return None
    path = regular_file(folder, MANIFEST_NAME)
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise ChainError(f"{path} was not written by save_chain. Delete or rename it.")
    try:
        version = int(content["format_version"])
        if version > FORMAT_VERSION:
            raise ChainError(f"{path} has format version {version}. Upgrade with pip install -U peft-aso.")
        tasks = {entry["task"]: dict(entry) for entry in content["tasks"]}
        for task, entry in tasks.items():
            if version < 2:
                entry.setdefault("scale", None)
            _check_entry(task, entry, path)
        base_model = content.get("base_model_name_or_path")
        unfinished = [name for name in content.get("unfinished", []) if is_folder_name(name)]
    except ChainError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ChainError(f"{path} is damaged ({type(error).__name__}: {error}). Restore or delete it.") from error
    return Manifest(tasks, base_model if isinstance(base_model, str) else None, unfinished)


def _check_entry(task: str, entry: Mapping[str, Any], path: Path) -> None:
    check_task_name(task, path)
    if entry["folder"] != ROOT:
        check_task_name(entry["folder"], path)
    if not _are_strings(entry["history"]) or not isinstance(entry["sha256"], str):
        raise TypeError(f"the entry of {task!r}")
    if "repo_id" in entry:
        repo, revision = entry["repo_id"], entry.get("revision")
        if not (isinstance(repo, str) and REPO_ID.fullmatch(repo) and re.fullmatch("[0-9a-f]{40}", str(revision))):
            raise ChainError(f"{path} has no valid repository and commit for {task!r}. Restore or delete it.")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace `chain.json` in one step: a reader finds the old one or the new one, also after a power cut."""
    from .. import __version__

    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_aso_version": __version__,
        "base_model_name_or_path": manifest.base_model,
        "tasks": list(manifest.tasks.values()),
        **({"unfinished": list(manifest.unfinished)} if manifest.unfinished else {}),
    }
    with staging(folder) as stage:
        (stage / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        flush(stage)
        os.replace(stage / MANIFEST_NAME, folder / MANIFEST_NAME)
    flush(folder, deep=False)


def with_history(tasks: Mapping[str, Sequence[str]], wanted: Sequence[str] | None) -> list[str]:
    """The wanted tasks and all that they were trained on top of, in the order of `tasks` (task -> history).

    Raises:
        ChainError: a wanted task is not there, or none is wanted.
    """
    if wanted is None:
        return list(tasks)
    to_visit = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [task for task in to_visit if task not in tasks]
    if unknown or not to_visit:
        what = f"There is no task {unknown[0]!r} here" if unknown else "tasks is empty"
        raise ChainError(f"{what}. There are: {', '.join(map(repr, tasks))}.")
    found: set[str] = set()
    while to_visit:
        task = to_visit.pop()
        if task in tasks and task not in found:
            found.add(task)
            to_visit.extend(tasks[task])
    return [task for task in tasks if task in found]


# ---- writing ----------------------------------------------------------------------------------------------------


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, which is made; both are gone after an error if `folder` was new.

    Raises:
        ChainError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ChainError(f"{folder} is a file. Give the name of a folder; it is made if it does not exist.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder, ignore_cleanup_errors=True) as stage:
            yield Path(stage)
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # only if nothing is in it


def flush(path: Path, deep: bool = True) -> None:
    """A folder, and if deep all that is in it, is on the disk when this returns."""
    places = [path, *(path.rglob("*") if deep else ())]
    for place in places:
        if os.name == "nt" and place.is_dir():  # Windows has no handle for a folder
            continue
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- adapters ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an adapter lies.

    Attributes:
        path: its folder.
        entry: what a `chain.json` has on it.
        origin: its `repo_id`, `revision` and `folder` on the Hub.
        pinned: whether it was named by the `chain.json` of another repository, and not by the user.
    """

    path: Path
    entry: dict[str, Any] | None = None
    origin: dict[str, str] | None = None
    pinned: bool = False


@dataclass(frozen=True)
class AdapterFile:
    """One adapter on the disk: where, which task it holds, and its `ASOLoraConfig` or stock `LoraConfig`."""

    place: Place
    name: str
    config: Any

    @property
    def is_stock(self) -> bool:
        """True for a LoRA adapter that was trained without this package."""
        return not isinstance(self.config, ASOLoraConfig)

    @property
    def history(self) -> list[str]:
        """The tasks learned before this one, oldest first."""
        return [] if self.is_stock else list(self.config.history or [])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file, on the CPU, by PEFT's names for the disk.

        Raises:
            ChainError: the file is truncated or damaged, empty, or holds NaN or Inf.
        """
        path = regular_file(self.place.path, SAFETENSORS_WEIGHTS_NAME)
        try:
            with safe_open(str(path), framework="pt") as file:
                # cloned: a view of the file would change, or crash, when the file is saved anew
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            with path.open("rb") as start:
                if start.read(64).startswith(b"version https://git-lfs"):
                    raise ChainError(f"{path} is a Git LFS pointer. Run `git lfs pull` in its repository.") from error
            raise ChainError(f"{path} is truncated or damaged ({error}). Download or save it again.") from error
        if not found:
            raise ChainError(f"{path} holds no tensors. Save the adapter again.")
        for name, tensor in found.items():
            if not is_finite(tensor):
                raise ChainError(f"{name} in {path} holds NaN or Inf. Use an earlier checkpoint.")
        return found


def adapter_hash(tensors: Mapping[str, torch.Tensor], config: Any) -> str:
    """`ASOLoraModel.adapter_hash` of a file: the LoRA tensors and the scale."""
    return weights_hash({key: tensor for key, tensor in tensors.items() if ".lora_" in key}, config)


def mismatch(adapter: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """In what the adapter differs from its entry in `chain.json`; None if in nothing."""
    entry, config = adapter.place.entry, adapter.config
    if entry is None:
        return None
    if adapter.name != entry["task"]:
        return f"the task {adapter.name!r}, and chain.json has {entry['task']!r}"
    if adapter.history != entry["history"]:
        return f"the history {adapter.history}, and chain.json has {entry['history']}"
    is_old = "scale" in entry
    digest = weights_hash(tensors, None if is_old else config)
    if digest != entry["sha256"]:
        what = "weights" if is_old else "weights or another scale"
        return f"other {what} than save_chain wrote: sha256 {digest}, and chain.json has {entry['sha256']}"
    scale = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}
    if is_old and entry["scale"] not in (None, scale):
        return f"another scale: {scale}, and chain.json has {entry['scale']}"
    return None


def find_in_folder(folder: Path, tasks: Sequence[str] | None = None) -> list[Place]:
    """The adapters of a chain's folder: those that its `chain.json` names, or all where there is none.

    A warning names adapters that lie there and that `chain.json` does not name.

    Raises:
        ChainError: no such folder, no adapter in it, a damaged `chain.json`, a link that leads out of the folder.
    """
    if folder.is_file():
        raise ChainError(f"{folder} is a file. Give the folder that it is in.")
    if not folder.is_dir():
        raise ChainError(f"There is no folder {str(folder)!r}. Give a folder, or the id of a repository (user/chain).")
    manifest = read_manifest(folder)
    inside = [place for place in sorted(folder.iterdir()) if not place.name.startswith(".")]
    inside = [place for place in inside if os.path.lexists(place / CONFIG_NAME)]
    if manifest is None:
        root = [folder] if os.path.lexists(folder / CONFIG_NAME) else []
        if not root and not inside:
            raise ChainError(
                f"There is no adapter in {folder}. Give a folder written by save_chain or model.save_pretrained, or a "
                "list of adapter folders."
            )
        for place in inside:
            _refuse_escape(folder, place)
        return [Place(place) for place in [*root, *inside]]
    wanted = with_history({task: entry["history"] for task, entry in manifest.tasks.items()}, tasks)
    named = {entry["folder"] for entry in manifest.tasks.values()} | set(manifest.unfinished)
    others = [place.name for place in inside if place.name not in named and _is_own(place)]
    if others and tasks is None:
        warnings.warn(
            f"{folder} holds the adapters {', '.join(map(repr, others))}, which its {MANIFEST_NAME} does not name: "
            "left out. To add them, load a list of all the adapters' folders and save it with save_chain.",
            stacklevel=5,
        )
    entries = [manifest.tasks[task] for task in wanted]
    for entry in entries:
        if "repo_id" not in entry:
            _refuse_escape(folder, folder / entry["folder"])
    return [Place(folder / entry["folder"], entry) for entry in entries]


def _is_own(folder: Path) -> bool:
    try:
        return bool(_read_json(regular_file(folder, CONFIG_NAME)).get("peft_type") == PEFT_TYPE_NAME)
    except ChainError:
        return False


def read_adapter(place: Place) -> AdapterFile:
    """Read one adapter's config and see that its weights are in a file that can be read safely.

    Raises:
        ChainError: no adapter in the folder; only pickled weights; a link that leads out of the folder; a config that
            is no JSON, or of another PEFT method.
    """
    path = place.path
    values = _read_json(regular_file(path, CONFIG_NAME))
    kind = values.get("peft_type")
    if kind not in (PEFT_TYPE_NAME, "LORA"):
        raise ChainError(
            f"{path} holds an adapter of peft_type {kind!r}. A chain is made of {PEFT_TYPE_NAME} adapters; stock LORA "
            "adapters can join it with load_history."
        )
    if not os.path.lexists(path / SAFETENSORS_WEIGHTS_NAME):
        pickles = [each.name for each in path.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise ChainError(
                f"{path} has its weights as a pickle ({pickles[0]}), which can run code when it is read. If you trust "
                "it, load it with peft.PeftModel.from_pretrained and save it again, which writes safetensors."
            )
    regular_file(path, SAFETENSORS_WEIGHTS_NAME)
    values.pop("runtime_config", None)  # of the process that saved it; PEFT drops it as well
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        config = config_class.from_peft_type(**config_class.check_kwargs(**values))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ChainError(f"{path / CONFIG_NAME} is not a valid config: {error} Save the adapter again.") from error
    for setting, words in _wrong_settings(config):
        raise ChainError(f"{path / CONFIG_NAME} has {setting}={getattr(config, setting)!r}: it should be {words}.")
    name = getattr(config, "task_name", None) or path.resolve().name
    check_task_name(name, path)
    return AdapterFile(place, name, config)


def _wrong_settings(config: Any) -> Iterator[tuple[str, str]]:
    """Settings of a type that PEFT would fail on later, with what they should be."""
    if not isinstance(config.r, int) or config.r < 1:
        yield "r", "a whole number of at least 1"
    if not isinstance(config.lora_alpha, (int, float)):
        yield "lora_alpha", "a number"
    if not isinstance(config.target_modules, (str, type(None))) and not _are_strings(config.target_modules):
        yield "target_modules", "a list of names or a regular expression"
    for name, kinds in (("history_hashes", str), ("similarities", (int, float)), ("soft_coefficients", (int, float))):
        found = getattr(config, name, None) or {}
        values = list(found.values()) if isinstance(found, dict) else [None]
        lists = [value if isinstance(value, list) else [value] for value in values]
        if not all(each and all(isinstance(one, kinds) for one in each) for each in lists):
            yield name, "a number (or a list of one a layer), or a SHA-256, for each earlier task"


def _are_strings(values: Any) -> bool:
    return isinstance(values, (list, set, tuple)) and all(isinstance(value, str) for value in values)


def check_task_name(name: Any, where: Path | str) -> None:
    """Refuse names that would lead out of a folder.

    Raises:
        ChainError: the name is no text, is empty, or has a slash, a backslash, a null or a leading dot.
    """
    if not is_folder_name(name):
        raise ChainError(f"{where}: {name!r} cannot be the name of a task. Use letters, digits, '-' and '_'.")


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file directly in `folder`.

    Raises:
        ChainError: it does not exist, is no regular file, or is a link that leads out of the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise ChainError(f"{folder} has no file {name}. It is no adapter's folder, or the download is incomplete.")
    _refuse_escape(folder, path)
    if not path.is_file():
        raise ChainError(f"{path} is not a regular file. Save the adapter again.")
    return path


def _refuse_escape(folder: Path, path: Path) -> None:
    """Refuse links out of a folder, but for the Hub cache's own (from snapshots/<revision> to blobs)."""
    root, target = folder.resolve(), path.resolve()
    caches = [each.parent.parent / "blobs" for each in (root, *root.parents) if each.parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *caches)):
        raise ChainError(f"{path} is a link that leads out of its folder. Put the files themselves there.")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ChainError: it is absurdly large, no JSON, or no object.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise ChainError(f"{path} has {path.stat().st_size} bytes, too many for its kind. Save the adapter again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChainError(f"{path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(values, dict):
        raise ChainError(f"{path} holds a {type(values).__name__}, not an object. Save the adapter again.")
    return values
