"""`load_chain` and `load_history` from folders and from the Hub, in any mixture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..chain import loading
from .fetching import ADAPTER_FILES, Access, Source, fetch, fetch_each, is_on_hub


def load_chain(
    base: nn.Module,
    source: Source | Sequence[Source],
    *,
    tasks: Sequence[str] | None = None,
    trainable: bool = False,
    strict: bool = True,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """Put all tasks of a chain onto a base model; the newest is active, on top of its history.

    From the Hub only `chain.json`, configs and safetensors are fetched, in parallel; the commit of each repository is
    kept in its adapters' configs (`origin`). Tasks that a chain's manifest pins in other repositories are
    fetched at those commits. What has been fetched once is loaded offline.

    Adapters that lay in a folder when `save_chain` saved another chain into it are left out, with a warning.

    Args:
        base: the base model, without adapters. It is changed in place, as by `get_peft_model`.
        source: a folder written by `model.save_pretrained` or `save_chain`, the id of a repository on the Hub
            ("user/chain"), or a list of adapter folders and ids, oldest first.
        tasks: load only these tasks, and what they were trained on top of. None: all.
        trainable: whether the newest task can be trained on. Its history is frozen either way.
        strict: whether weights or histories that differ from what the manifest says (of the chain, or of a task
            trained on top of others) are an error; else a warning.
        autocast_adapter_dtype: as in PEFT: keep adapter weights in float32 where the model is in half
            precision.
        revision: branch, tag or commit of a single repository. None: its main branch.
        token: for private repositories. None: the one of `hf auth login`.
        cache_dir: where files are kept. None: huggingface_hub's cache.
        local_files_only: do not ask the Hub.

    Returns:
        The `PeftModel`, in eval mode unless trainable (then its mode is left as it was). Each adapter is
        called by its task's name.

    Raises:
        ChainError: before the model is touched: a repository, revision or file that is not there, unreadable or
            unsafe files, NaN or Inf, another base model, a history that is missing or cyclic, or has other
            weights than the ones trained on, two folders with one task, a name that cannot be used, a base
            model that has adapters already.
        ValueError: a revision for more than one repository.
    """
    if revision is not None and not is_on_hub(source):
        raise ValueError("revision= is for one repository on the Hub. Histories are pinned by their manifest.")
    access = Access(revision, token, cache_dir, local_files_only)
    if isinstance(source, (str, os.PathLike)):
        found, where = fetch(source, access, tasks, strict), str(source)
    else:
        found, where = fetch_each(source, access, strict), "the list"
    wanted = [tasks] if isinstance(tasks, str) else tasks
    passed_over = [name for name in found.left_out if wanted is None or name in wanted]
    if passed_over:
        warnings.warn(
            f"{where} holds {', '.join(map(repr, passed_over))} beside the chain that was saved there last: left out. "
            "To load them, give load_chain a list of all adapter folders that you mean, oldest first; else move or "
            "delete them.",
            stacklevel=2,
        )
    return loading.load_adapters(
        base, found.adapters, found.manifest, where, tasks=tasks, trainable=trainable, strict=strict,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )  # fmt: skip


def load_history(
    model: Any,
    source: Source,
    name: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """Take an adapter in as history for the tasks that come: a stock LoRA adapter, or one of this package's.

    Args:
        model: a `PeftModel` with ASO_LORA adapters, or a bare base model, which is wrapped.
        source: the adapter's folder, or the id of a repository that has it at its root ("user/plain-lora"). A stock
            adapter (peft_type LORA) gets an empty history.
        name: the task's name in the chain. None: the one in its config, else the folder's or repository's.
        autocast_adapter_dtype: as in PEFT: keep adapter weights in float32 where the model is in half
            precision.
        revision, token, cache_dir, local_files_only: as `load_chain`.

    Returns:
        The `PeftModel`. What was active stays active, and what trained still trains. A model that had no
        adapter runs the loaded one, frozen.

    Raises:
        ChainError: before the model is touched: as `load_chain`; an adapter that cannot be summed with others
            (DoRA, trained biases, PiSSA and others that change the base weights); a name that is taken; a
            history that is not in the model.
    """
    folder, fallback = source, None
    if is_on_hub(source):
        folder = Access(revision, token, cache_dir, local_files_only).snapshot(source, ADAPTER_FILES)
        fallback = source.split("/")[1]
    return loading.load_history(model, folder, name, fallback, autocast_adapter_dtype=autocast_adapter_dtype)
