"""A chain on the disk: `chain.json` and one folder per adapter, read without trusting what is in them.

Only safetensors and JSON are read; links that lead out of a folder are refused. Nothing here touches a model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..attribution.config import fits
from ..tuner.adapter_file import is_finite, weights_hash
from ..tuner.config import PEFT_TYPE_NAME, ASOLoraConfig
from ..tuner.history import is_folder_name

MANIFEST_NAME = "chain.json"
README_NAME = "README.md"
FORMAT, FORMAT_VERSION = "peft_aso chain", 2
ROOT = "."  # the folder of a task that is next to its chain.json
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEMPORARY = ".peft-aso-"  # beginning of the names of temporary folders
_LARGEST_JSON = 16 * 2**20
_ORIGIN = {"repo_id", "revision", "folder", "sha256"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Number = int | float
_Names = str | list[str] | None
_PerTask = dict[str, _Number | list[_Number]] | None  # task -> one number, or one a layer
# Types that are checked where a file is read (docs/*.schema.json has them too); other settings are left to PEFT.
ENTRY_TYPES: dict[str, Any] = {
    "task": str, "folder": str, "history": list[str], "sha256": str, "rank": int, "similarities": _PerTask,
    "soft_coefficients": _PerTask, "repo_id": str, "revision": str,
}  # fmt: skip
SETTING_TYPES: dict[str, Any] = {
    "r": int, "lora_alpha": _Number, "lora_dropout": _Number, "use_rslora": bool, "lora_bias": bool, "train_a": bool,
    "fan_in_fan_out": bool, "rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, _Number] | None,
    "target_modules": _Names, "exclude_modules": _Names, "modules_to_save": list[str] | None, "combined": bool,
    "base_model_name_or_path": str | None, "history_hashes": dict[str, str] | None, "similarities": _PerTask,
    "soft_coefficients": _PerTask, "origin": dict[str, str] | None,
}  # fmt: skip


class ChainError(ValueError):
    """A chain of tasks cannot be read, loaded, saved or exported. The message tells why and what to do."""


def warn_or_raise(message: str, strict: bool) -> None:
    """A `ChainError` if strict, else a warning."""
    if strict:
        raise ChainError(f"{message} Or pass strict=False.")
    warnings.warn(message, stacklevel=4)


class Manifest(NamedTuple):
    """What `chain.json` holds: task -> its entry (`ENTRY_TYPES`), in the order of learning, and the base model.

    `sha256` is `weights_hash` with the config; in format version 1 without it, and an entry has `scale`. `unfinished`
    has the folders that a save which was killed may have left.
    """

    tasks: dict[str, dict[str, Any]]
    base_model: str | None = None
    unfinished: Sequence[str] = ()


def hub_id(name: str | None) -> str | None:
    """The name of a base model if it can be one on the Hub; None for a folder of this machine."""
    is_id = name is not None and re.fullmatch(rf"{REPO_ID.pattern}|\w[\w.-]*", name) and not os.path.exists(name)
    return name if is_id else None


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's `chain.json`; None if there is none; `ChainError` if it is damaged or of a newer format."""
    if not os.path.lexists(folder / MANIFEST_NAME):
        return None
    path = regular_file(folder, MANIFEST_NAME)
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise ChainError(f"{path} was not written by save_chain. Delete or rename it.")
    try:
        version = content["format_version"]
        if version > FORMAT_VERSION:
            raise ChainError(f"{path} has format version {version}. Upgrade with pip install -U peft-aso.")
        tasks = {entry["task"]: dict(entry) for entry in content["tasks"]}
        for task, entry in tasks.items():
            if version < 2:
                entry.setdefault("scale", None)
            _check_types(ENTRY_TYPES, {**dict.fromkeys(("folder", "history", "sha256")), **entry}, path)
            for name in (task, *entry["history"], *({entry["folder"]} - {ROOT})):
                check_task_name(name, path)
            pinned = f"{entry.get('repo_id')}@{entry.get('revision')}"
            if "repo_id" in entry and not re.fullmatch(f"{REPO_ID.pattern}@[0-9a-f]{{40}}", pinned):
                raise ChainError(f"{path} has no valid repository and commit for {task!r}. Restore or delete it.")
        base_model, unfinished = content.get("base_model_name_or_path"), content.get("unfinished", [])
        _check_types({"unfinished": list[str]}, content, path)
        for name in unfinished:
            check_task_name(name, path)
    except ChainError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ChainError(f"{path} is damaged ({type(error).__name__}: {error}). Restore or delete it.") from error
    return Manifest(tasks, base_model if isinstance(base_model, str) else None, unfinished)


def _check_types(types: Mapping[str, Any], values: Mapping[str, Any], path: Path) -> None:
    """Raise `ChainError` if a value does not have its type."""
    for name in types.keys() & values.keys():
        if not fits(values[name], types[name]):
            text = f"{path} is damaged: {name}={values[name]!r} is not of the type {types[name]}."
            raise ChainError(f"{text} Save the adapter again.")


def write_manifest(folder: Path, manifest: Manifest, stage: Path) -> None:
    """Replace `chain.json` in one step: a reader finds the old one or the new one, also after a power cut.

    It is written in `stage`, a folder on the same disk.
    """
    from .. import __version__

    content = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "peft_aso_version": __version__,
        "base_model_name_or_path": manifest.base_model, "tasks": list(manifest.tasks.values()),
        **({"unfinished": manifest.unfinished} if manifest.unfinished else {}),
    }  # fmt: skip
    (stage / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(stage / MANIFEST_NAME, deep=False)
    os.replace(stage / MANIFEST_NAME, folder / MANIFEST_NAME)
    flush(folder, deep=False)


def with_history(tasks: Mapping[str, Sequence[str]], wanted: Sequence[str] | None) -> list[str]:
    """The wanted tasks (None: all) and what they were trained on top of, in the order of `tasks` (task -> history).

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


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, which is made; both are gone after an error if it was new.

    A second process that writes into `folder` waits, where its file system has locks (not on Windows and on NFS).
    What killed ones have left is removed.
    """
    if folder.exists() and not folder.is_dir():
        raise ChainError(f"{folder} is a file. Give the name of a folder; it is made if it does not exist.")
    is_new, lock = not folder.exists(), None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder, ignore_cleanup_errors=True) as stage:
            yield Path(stage)
    finally:
        if lock is not None:
            os.close(lock)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # only if nothing is in it


def flush(path: Path, deep: bool = True) -> None:
    """A folder, and if deep all that is in it, is on the disk when this returns."""
    for place in [path, *(path.rglob("*") if deep else ())]:
        if os.name == "nt" and place.is_dir():  # Windows has no handle for a folder
            continue
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Place(NamedTuple):
    """Where an adapter is."""

    path: Path
    entry: dict[str, Any] | None = None  # what a chain.json has on it
    origin: dict[str, str] | None = None  # its repo_id, revision and folder on the Hub
    pinned: bool = False  # whether the chain.json of another repository names it, and not the user


class AdapterFile(NamedTuple):
    """One adapter on the disk: where it is, which task it holds, and its `ASOLoraConfig` or stock `LoraConfig`."""

    place: Place
    name: str
    config: Any

    @property
    def is_stock(self) -> bool:
        """True for a LoRA adapter of stock PEFT."""
        return not isinstance(self.config, ASOLoraConfig)

    @property
    def history(self) -> list[str]:
        """The tasks learned before this one, oldest first."""
        return [] if self.is_stock else list(self.config.history or [])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file; `ChainError` if it is damaged, has no LoRA matrices, or holds NaN or Inf."""
        path = regular_file(self.place.path, SAFETENSORS_WEIGHTS_NAME)
        try:
            with safe_open(str(path), framework="pt") as file:
                # cloned: a view of the file would change, or crash, when the file is saved anew
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            with path.open("rb") as start:
                is_pointer = start.read(64).startswith(b"version https://git-lfs")
            advice = "It is a pointer: run `git lfs pull`." if is_pointer else "Download or save it again."
            raise ChainError(f"{path} is truncated or damaged ({error}). {advice}") from error
        if not any(".lora_" in name for name in found):
            raise ChainError(f"{path} holds no LoRA matrices. Save the adapter again.")
        sizes = {0}
        for name, tensor in found.items():
            is_lora = ".lora_" in name
            if not is_finite(tensor) or is_lora and tensor.dtype not in _FLOATS:
                raise ChainError(f"{name} in {path} holds NaN or Inf, or {tensor.dtype}. Use an earlier checkpoint.")
            sizes.update(tensor.shape if is_lora else ())
        rank = max(self.config.r, *(self.config.rank_pattern or {}).values(), 0)
        if rank > max(sizes):  # may not fit into memory
            raise ChainError(f"{path} has no matrix of rank {rank}, which its config has. Save the adapter again.")
        return found


def adapter_hash(tensors: Mapping[str, torch.Tensor], config: Any) -> str:
    """`ASOLoraModel.adapter_hash` of a file: the LoRA tensors and the scale."""
    return weights_hash({key: tensor for key, tensor in tensors.items() if ".lora_" in key}, config)


def mismatch(adapter: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """In what the adapter differs from its entry in `chain.json`; None if in nothing."""
    entry, config = adapter.place.entry, adapter.config
    if entry is None:
        return None
    is_old = "scale" in entry  # format version 1, whose sha256 does not have the scale
    scale = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}
    for what, found, expected in (
        ("another task", adapter.name, entry["task"]),
        ("another history", adapter.history, entry["history"]),
        ("another scale", scale, is_old and entry["scale"] or scale),
        ("other weights or another scale: sha256", weights_hash(tensors, None if is_old else config), entry["sha256"]),
    ):
        if found != expected:
            return f"{what} {found}, and chain.json has {expected}"
    return None


def find_in_folder(folder: Path, tasks: Sequence[str] | None = None) -> list[Place]:
    """The adapters of a chain's folder: those that its `chain.json` names, or all where there is none.

    A warning names adapters in it that `chain.json` does not name. What is missing, damaged, or leads out of the
    folder is a `ChainError`.
    """
    if not folder.is_dir():
        raise ChainError(f"There is no folder {str(folder)!r}. Give a folder, or the id of a repository (user/chain).")
    manifest = read_manifest(folder)
    inside = [place for place in sorted(folder.iterdir()) if not place.name.startswith(".")]
    inside = [place for place in inside if os.path.lexists(place / CONFIG_NAME)]
    if manifest is None:
        root = [folder] if os.path.lexists(folder / CONFIG_NAME) else []
        if not root and not inside:
            raise ChainError(f"There is no adapter in {folder}. Give a folder that save_chain or PEFT wrote.")
        for place in inside:
            _refuse_escape(folder, place)
        return [Place(place) for place in [*root, *inside]]
    wanted = with_history({task: entry["history"] for task, entry in manifest.tasks.items()}, tasks)
    named = {entry["folder"] for entry in manifest.tasks.values()}
    unnamed = [place for place in inside if place.name not in named and (place / CONFIG_NAME).is_file()]
    ours = f'"{PEFT_TYPE_NAME}"'
    others = [place.name for place in unnamed if ours in (place / CONFIG_NAME).read_text(errors="replace")]
    if others and tasks is None:
        text = f"{folder} holds adapters that its {MANIFEST_NAME} does not name: {', '.join(map(repr, others))}."
        warnings.warn(f"{text} To add them, load a list of all folders and save it with save_chain.", stacklevel=5)
    found = [Place(folder / manifest.tasks[task]["folder"], manifest.tasks[task]) for task in wanted]
    for each in found:
        _refuse_escape(folder, each.path)
    return found


def read_adapter(place: Place) -> AdapterFile:
    """Read one adapter's config and see that its weights are in a file that can be read safely.

    Raises:
        ChainError: no adapter, only pickled weights, a link out of the folder, a config that is no valid one.
    """
    path = place.path
    values = _read_json(regular_file(path, CONFIG_NAME))
    kind = values.get("peft_type")
    if kind not in (PEFT_TYPE_NAME, "LORA"):
        raise ChainError(f"{path} has peft_type {kind!r}. Chains have {PEFT_TYPE_NAME}, and load_history takes LORA.")
    if not os.path.lexists(path / SAFETENSORS_WEIGHTS_NAME):
        pickles = [each.name for each in path.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise ChainError(f"{path} has a pickle ({pickles[0]}), which can run code. If you trust it, save it anew.")
    regular_file(path, SAFETENSORS_WEIGHTS_NAME)
    _check_types(SETTING_TYPES, values, path / CONFIG_NAME)
    if set(_ORIGIN if values.get("origin") is None else values["origin"]) != _ORIGIN:
        raise ChainError(f"{path / CONFIG_NAME} has another origin than {sorted(_ORIGIN)}. Save the adapter again.")
    if values.get("megatron_config"):
        raise ChainError(f"{path / CONFIG_NAME} names a module to import (megatron_config). Save it without.")
    values.pop("runtime_config", None)  # of the process that saved it; PEFT drops it as well
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        config = config_class.from_peft_type(**config_class.check_kwargs(**values))
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise ChainError(f"{path / CONFIG_NAME} is not a valid config: {error} Save the adapter again.") from error
    name = getattr(config, "task_name", None) or os.path.basename(os.path.realpath(path))
    check_task_name(name, path)
    return AdapterFile(place, name, config)


def check_task_name(name: Any, where: Path | str) -> None:
    """Raise `ChainError` for names that would lead out of a folder: no text, empty, with a slash or a leading dot."""
    if not is_folder_name(name):
        raise ChainError(f"{where}: {name!r} cannot be the name of a task. Use letters, digits, '-' and '_'.")


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file directly in `folder`; `ChainError` if there is none, or a link that leads out of it."""
    path = folder / name
    if not os.path.lexists(path):
        raise ChainError(f"{folder} has no file {name}. It is no adapter's folder, or the download is incomplete.")
    _refuse_escape(folder, path)
    if not path.is_file():
        raise ChainError(f"{path} is not a regular file. Save the adapter again.")
    return path


def _refuse_escape(folder: Path, path: Path) -> None:
    """Refuse links out of a folder, but for the Hub cache's own (from snapshots/<revision> to blobs)."""
    root, target = (Path(os.path.realpath(each)) for each in (folder, path))  # a loop of links is no error
    caches = [each.parent.parent / "blobs" for each in (root, *root.parents) if each.parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *caches)):
        raise ChainError(f"{path} is a link that leads out of its folder. Put the files themselves there.")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ChainError` for anything else, and for absurdly large files."""
    if path.stat().st_size > _LARGEST_JSON:
        raise ChainError(f"{path} has {path.stat().st_size} bytes, too many for its kind. Save the adapter again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, allow_nan=False, ensure_ascii=False).encode()  # NaN, Inf or half a character: an error
    except (ValueError, RecursionError) as error:
        raise ChainError(f"{path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(values, dict):
        raise ChainError(f"{path} holds a {type(values).__name__}, not an object. Save the adapter again.")
    return values
