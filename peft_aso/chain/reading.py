"""Read adapter folders from the disk, trusting nothing: safetensors only, no link that leads away, no NaN.

Nothing here touches a model. A folder that passes is an `AdapterFile`: its config, parsed, and its weights on
demand.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..tuner.checks import is_finite
from ..tuner.config import PEFT_TYPE_NAME, ASOLoraConfig
from ..tuner.history import is_folder_name
from .errors import ChainError

STOCK_TYPE_NAME = "LORA"
_MAX_CONFIG_BYTES = 16 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class AdapterFile:
    """One adapter on the disk.

    Attributes:
        path: its folder.
        name: the task that it holds (the config's task name, else the folder's name).
        config: an `ASOLoraConfig`, or a stock `LoraConfig`.
    """

    path: Path
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

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors of the file, on the CPU, with the names that PEFT gives them on the disk.

        Raises:
            ChainError: the file is truncated or damaged, empty, or holds NaN or Inf.
        """
        path = plain_file(self.path, SAFETENSORS_WEIGHTS_NAME)
        try:
            with safe_open(str(path), framework="pt") as file:
                # cloned: a view of the file would change, or crash, when the file is saved anew
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ChainError(_damaged(path, error)) from error
        if not tensors:
            raise ChainError(f"{path} holds no tensors. The adapter was saved without its weights: save it again.")
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise ChainError(
                    f"The weights of {self.name!r} hold NaN or Inf ({name} in {path}). The file is damaged "
                    "or the training diverged; nothing was loaded. Use an earlier checkpoint."
                )
        return tensors


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read one adapter's config and see that its weights are in a file that can be read safely.

    Raises:
        ChainError: no adapter in the folder; only pickled weights; a link that leads out of the folder; a
            config that is no JSON, or of another PEFT method.
    """
    path = Path(folder)
    values = read_json_config(plain_file(path, CONFIG_NAME))
    kind = values.get("peft_type")
    if kind not in (PEFT_TYPE_NAME, STOCK_TYPE_NAME):
        raise ChainError(
            f"{path} holds an adapter of peft_type {kind!r}. A chain is made of {PEFT_TYPE_NAME} adapters; "
            f"stock {STOCK_TYPE_NAME} adapters can join it with load_history. Other methods cannot."
        )
    _refuse_pickles(path)
    plain_file(path, SAFETENSORS_WEIGHTS_NAME)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        config = config_class.from_peft_type(**config_class.check_kwargs(**values))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ChainError(
            f"{path / CONFIG_NAME} is not a valid config: {str(error).rstrip('.')}. Save the adapter again, "
            "or mend the file."
        ) from error
    for setting, words in _wrong_settings(config):
        raise ChainError(f"{path / CONFIG_NAME} has {setting}={getattr(config, setting)!r}: it should be {words}.")
    name = getattr(config, "task_name", None) or path.resolve().name
    check_task_name(name, path)
    return AdapterFile(path, name, config)


def _wrong_settings(config: Any) -> Iterator[tuple[str, str]]:
    """Settings of a type that PEFT would stumble over later, or that is shown, with what they should be."""
    targets = config.target_modules
    if not isinstance(config.r, int) or config.r < 1:
        yield "r", "a whole number of at least 1"
    if not isinstance(config.lora_alpha, (int, float)):
        yield "lora_alpha", "a number"
    if not isinstance(targets, (str, type(None))) and not are_strings(targets):
        yield "target_modules", "a list of names or a regular expression"
    for name in ("similarities", "soft_coefficients"):
        found = getattr(config, name, None)
        if found is not None and not (isinstance(found, dict) and all(map(_is_number_or_numbers, found.values()))):
            yield name, "a number, or a list of one a layer, for each earlier task"


def are_strings(values: Any) -> bool:
    """Whether it is a list (or set, or tuple) of strings."""
    return isinstance(values, (list, set, tuple)) and all(isinstance(value, str) for value in values)


def _is_number_or_numbers(value: Any) -> bool:
    each = value if isinstance(value, list) else [value]
    return bool(each) and all(isinstance(one, (int, float)) for one in each)


def read_each(folders: Iterable[tuple[str, Path]], damaged: dict[str, str] | None = None) -> list[AdapterFile]:
    """Read adapters' configs.

    Args:
        folders: what each is called, and where it is.
        damaged: takes the message of each that cannot be read, by what it is called. None: the first is an error.

    Raises:
        ChainError: as `read_adapter`.
    """
    found = []
    for name, folder in folders:
        try:
            found.append(read_adapter(folder))
        except ChainError as error:
            if damaged is None:
                raise
            damaged[name] = str(error)
    return found


def find_adapters(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], without: Collection[str] = ()
) -> list[Path]:
    """The adapter folders of a source: a list of folders as it stands, or a chain's folder looked through.

    In a chain's folder each adapter has a subfolder of its own; one called "default" lies in the folder
    itself, as PEFT saves it. Subfolders called as in `without` are passed over.

    Raises:
        ChainError: there is no such folder, it holds no adapter, or a subfolder is a link that leads out of
            it.
    """
    if not isinstance(source, (str, os.PathLike)):
        folders = [existing_folder(entry) for entry in source]
        if not folders:
            raise ChainError("The list of adapter folders is empty. Give at least one, oldest first.")
        return folders
    root = existing_folder(source)
    found = [root] if (root / CONFIG_NAME).is_file() else []
    inside = subfolders(root)
    for entry in inside:
        if entry.name not in without:
            refuse_escape(root, entry)
            found.append(entry)
    if not found and not inside:
        raise ChainError(
            f"There is no adapter in {root}: neither the folder nor a folder in it has a file "
            f"{CONFIG_NAME}. Give a folder written by model.save_pretrained or save_chain, or a list of "
            "adapter folders."
        )
    return found


def subfolders(root: Path) -> list[Path]:
    """The folders in a chain's folder that hold an adapter, by name."""
    entries = (entry for entry in sorted(root.iterdir()) if not entry.name.startswith("."))
    return [entry for entry in entries if (entry / CONFIG_NAME).is_file()]


def existing_folder(source: str | os.PathLike[str]) -> Path:
    """`source` as a path.

    Raises:
        ChainError: it is a file, or there is no such folder.
    """
    path = Path(source)
    if path.is_file():
        raise ChainError(f"{path} is a file. Give the folder that holds {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}.")
    if not path.is_dir():
        raise ChainError(
            f"There is no folder {str(source)!r} on this machine. Give an existing folder, or the id of a "
            'repository on the Hub, which has one slash ("user/chain").'
        )
    return path


def plain_file(folder: Path, name: str) -> Path:
    """The path of a regular file directly in `folder`.

    Raises:
        ChainError: it does not exist, is no regular file, or is a link that leads out of the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise ChainError(f"{folder} has no file {name}. It is not an adapter's folder, or its download is incomplete.")
    refuse_escape(folder, path)
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise ChainError(f"{path} is not a regular file. Save the adapter again.")
    return path


def check_task_name(name: Any, where: Path) -> None:
    """Refuse names that lead out of a folder when they are used as one.

    Raises:
        ChainError: the name is no text, is empty, or has a slash, a backslash, a null or a leading dot.
    """
    if not is_folder_name(name):
        raise ChainError(
            f"{where} says that its task is called {name!r}, which cannot be the name of a task. Use "
            "letters, digits, '-' and '_'."
        )


def _refuse_pickles(folder: Path) -> None:
    """A clear word where an adapter has its weights in pickles only."""
    if os.path.lexists(folder / SAFETENSORS_WEIGHTS_NAME):
        return
    pickles = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in _PICKLES]
    if pickles:
        raise ChainError(
            f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code when it is "
            "read. Only safetensors is read here. If you trust the file, convert it once: load it with "
            "peft.PeftModel.from_pretrained and save it with save_pretrained, which writes safetensors."
        )


def refuse_escape(folder: Path, path: Path) -> None:
    """Refuse links out of a folder, but for the Hub cache's own (from snapshots/<revision> to blobs).

    Raises:
        ChainError: `path` is such a link.
    """
    root, target = folder.resolve(), path.resolve()
    if target.is_relative_to(root):
        return
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots" and target.is_relative_to(parent.parent.parent / "blobs"):
            return
    raise ChainError(
        f"{path} is a link that leads out of its folder (to {target}); it is not followed. Put the files "
        "themselves there, or pass the folders that you mean as a list."
    )


def read_json_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises:
        ChainError: it is absurdly large, no JSON, or no object.
    """
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ChainError(
            f"{path} has {path.stat().st_size} bytes; that is no adapter's config. Save the adapter again."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChainError(
            f"{path} is not valid JSON ({error}). The file is damaged: save the adapter again."
        ) from error
    if not isinstance(values, dict):
        raise ChainError(f"{path} is not the config of an adapter: it holds a {type(values).__name__}, not an object.")
    values.pop("runtime_config", None)  # of the process that saved it; PEFT drops it as well
    return values


def _damaged(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its repository."
    return (
        f"{path} cannot be read as safetensors ({error}). The file is truncated or damaged; nothing was "
        "loaded. Download or save it again."
    )
