"""`chain.json`: what `save_chain` wrote, in which order, and a fingerprint of each adapter's weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..tuner.persistence import ATTRIBUTION_KEY
from .errors import ChainError, warn_or_raise
from .reading import AdapterFile, are_strings, check_task_name, plain_file

MANIFEST_NAME = "chain.json"
FORMAT = "peft_aso chain"
FORMAT_VERSION = 1
ROOT = "."  # the folder of a task that lies beside its manifest
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the values as float32, in the order of the tensors' names.

    The dtype in which they are kept does not matter (PEFT changes it when it loads), nor does the layout of
    the file. The attribution vector is left out: the adapter is the same without it.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name == ATTRIBUTION_KEY:
            continue
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def scale_of(config: Any) -> dict[str, Any]:
    """What a config multiplies B A by: the same weights under another scale are another adapter."""
    return {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}


def describe(adapter: AdapterFile, folder: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """One task's entry in the manifest."""
    return {
        "task": adapter.name,
        "folder": folder,
        "history": adapter.history,
        "rank": adapter.config.r,
        "scale": scale_of(adapter.config),
        "sha256": weights_hash(weights),
        "similarities": adapter.config.similarities,
        "soft_coefficients": adapter.config.soft_coefficients,
    }


def write_manifest(
    folder: Path,
    entries: Sequence[Mapping[str, Any]],
    base_model: str | None,
    exports: Sequence[str] = (),
    left_out: Mapping[str, str | None] | None = None,
) -> None:
    """Write `chain.json` into `folder`.

    Args:
        entries: of `describe`, in the order in which the tasks were learned. An entry with a `repo_id` and a
            `revision` is of a task that lies in another repository, in the folder there that it names.
        exports: folders that hold no task but a sum of tasks.
        left_out: folders that hold an adapter which is not part of the chain, and `weights_hash` of its weights (None:
            they cannot be read).
    """
    from .. import __version__

    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_aso_version": __version__,
        "base_model_name_or_path": base_model,
        "tasks": list(entries),
        "exports": list(exports),
        "left_out": [{"folder": name, "sha256": digest} for name, digest in (left_out or {}).items()],
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Task -> its entry, in the manifest's order; None if the folder has no manifest.

    Raises:
        ChainError: the manifest is damaged, of a newer format, or names folders outside of its own.
    """
    found = read_listing(folder)
    return None if found is None else found.tasks


def read_base_model(folder: Path) -> str | None:
    """The name of the base model that the manifest gives, if any.

    Raises:
        ChainError: as `read_manifest`.
    """
    found = read_listing(folder)
    return None if found is None else found.base_model


class Listing(NamedTuple):
    """What a manifest says: task -> its entry, and the other arguments of `write_manifest`."""

    tasks: dict[str, dict[str, Any]]
    exports: list[str]
    left_out: dict[str, str | None]
    base_model: str | None


def read_listing(folder: Path) -> Listing | None:
    """The whole manifest; None if the folder has none.

    Raises:
        ChainError: as `read_manifest`.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    path = plain_file(folder, MANIFEST_NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_ours, version = content["format"] == FORMAT, int(content["format_version"])
        entries = {entry["task"]: dict(entry) for entry in content["tasks"]} if is_ours else {}
        exports = list(content.get("exports", [])) if is_ours else []
        left_out = {each["folder"]: each["sha256"] for each in content.get("left_out", [])} if is_ours else {}
        complete = all({"folder", "sha256"} <= set(e) and are_strings(e.get("history")) for e in entries.values())
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ChainError(
            f"{path} is damaged ({type(error).__name__}: {error}). Save the chain again, or delete the "
            "file: the adapters can be read without it."
        ) from error
    if not is_ours or not complete:
        raise ChainError(f"{path} was not written by save_chain. Delete or rename it: adapters are read without it.")
    if version > FORMAT_VERSION:
        raise ChainError(
            f"{path} has format version {version}; this package reads up to {FORMAT_VERSION}. Upgrade "
            "peft-aso, or delete the file: the adapters can be read without it."
        )
    for task, entry in entries.items():
        check_task_name(task, path)
        if entry["folder"] != ROOT:
            check_task_name(entry["folder"], path)
        if "repo_id" in entry and not _is_place(entry):
            raise ChainError(f"{path} has no valid repository and revision for the task {task!r}: {entry!r}.")
    for export in exports:
        check_task_name(export, path)
    base_model = content.get("base_model_name_or_path")
    return Listing(entries, exports, left_out, base_model if isinstance(base_model, str) else None)


def _is_place(entry: Mapping[str, Any]) -> bool:
    """Whether an entry names one commit of one repository."""
    repo, revision = entry["repo_id"], entry.get("revision")
    return bool(
        isinstance(repo, str) and REPO_ID.fullmatch(repo)
        and isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision)
    )  # fmt: skip


def check_listing(
    folder: Path | str, entries: Mapping[str, Mapping[str, Any]], adapters: Sequence[AdapterFile], strict: bool
) -> None:
    """Cross-check tasks and histories with the manifest; adapters that were added later need not be in it."""
    by_name = {adapter.name: adapter for adapter in adapters}
    for task, entry in entries.items():
        if task not in by_name:
            warn_or_raise(
                f"{MANIFEST_NAME} of {folder} lists the task {task!r} (folder {entry['folder']!r}), which is "
                "not there. The copy is incomplete: fetch that folder, or pass strict=False to load the "
                "others.",
                strict,
            )
        elif by_name[task].history != list(entry["history"]):
            warn_or_raise(
                f"The history of {task!r} is {by_name[task].history} in its adapter_config.json and "
                f"{entry['history']} in {MANIFEST_NAME} of {folder}. One of them was changed by hand; run "
                "save_chain again, or pass strict=False to believe adapter_config.json.",
                strict,
            )


def check_hash(
    adapter: AdapterFile, weights: Mapping[str, torch.Tensor], entry: Mapping[str, Any] | None, strict: bool
) -> None:
    """Compare an adapter's weights and scale with what the manifest says of them."""
    if entry is None:
        return
    scale = scale_of(adapter.config)
    if entry.get("scale", scale) != scale:  # manifests of earlier versions have none
        warn_or_raise(
            f"{adapter.name!r} in {adapter.path} has another scale than save_chain wrote: {scale} in its "
            f"adapter_config.json, {entry['scale']} in {MANIFEST_NAME}. If you changed it on purpose, run save_chain "
            "on the whole chain; else restore the file. strict=False loads what is there.",
            strict,
        )
    found = weights_hash(weights)
    if found != entry["sha256"]:
        warn_or_raise(
            f"The weights of {adapter.name!r} in {adapter.path} are not those that save_chain wrote: sha256 "
            f"{found} here, {entry['sha256']} in {MANIFEST_NAME}. If you saved the adapter again, run "
            "save_chain on the whole chain; else restore the file. strict=False loads what is there.",
            strict,
        )
