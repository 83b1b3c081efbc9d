"""Bring a chain's files from the Hub into the local cache: safetensors and JSON, nothing else."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..chain.errors import ChainError, warn_or_raise
from ..chain.loading import find_chain
from ..chain.manifest import MANIFEST_NAME, REPO_ID, ROOT, read_manifest, weights_hash
from ..chain.order import with_history
from ..chain.reading import AdapterFile, read_each

Source = str | os.PathLike[str]
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


@dataclass(frozen=True)
class Access:
    """How the Hub is asked: `revision`, `token`, `cache_dir` and `local_files_only` as in huggingface_hub."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def snapshot(self, repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
        """These files of a repository, in the cache."""
        chosen = revision or self.revision
        with said_clearly(repo, chosen):
            found = snapshot_download(
                repo, revision=chosen, token=self.token, cache_dir=self.cache_dir, library_name="peft-aso",
                local_files_only=self.local_files_only, allow_patterns=list(patterns),
            )  # fmt: skip
        return Path(found)


@dataclass
class Fetched:
    """What sources hold: adapters, oldest first where that is known, and what their manifests say of them.

    Attributes:
        left_out: folders that hold adapters and are no part of the chain.
        damaged: task -> what is wrong with its config. None: that is an error.
    """

    adapters: list[AdapterFile] = field(default_factory=list)
    manifest: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    damaged: dict[str, str] | None = None
    strict: bool = True

    def add(self, adapter: AdapterFile, entry: Mapping[str, Any] | None) -> None:
        """Take an adapter in; one that a later manifest pins is there already, if it has the same weights.

        Raises:
            ChainError: two manifests say that a task has different weights (a warning unless strict).
        """
        known = self.manifest.get(adapter.name)
        if known is not None and entry is not None and known["sha256"] != entry["sha256"]:
            warn_or_raise(
                f"{adapter.name!r} has weights of sha256 {known['sha256']} in one of the manifests, and of "
                f"{entry['sha256']} in another: a task was trained on top of other weights than these. Load the "
                "revision that it was trained on (its own manifest names it), or pass strict=False.",
                self.strict,
            )
        there = any(each.name == adapter.name for each in self.adapters)
        if not there or (known is None and entry is None):  # two without a manifest are an error later on
            self.adapters.append(adapter)
        if entry is not None:
            self.manifest.setdefault(adapter.name, entry)


def is_on_hub(source: Source | Sequence[Source]) -> TypeGuard[str]:
    """Whether a source is the id of a repository and no folder of this machine."""
    return isinstance(source, str) and REPO_ID.fullmatch(source) is not None and not Path(source).exists()


def fetch(
    source: Source,
    access: Access,
    tasks: Sequence[str] | None,
    strict: bool,
    damaged: dict[str, str] | None = None,
) -> Fetched:
    """The adapters of a chain's folder or repository, and of the repositories that its manifest pins.

    Args:
        tasks: only these, and what they were trained on top of.
        damaged: takes what is wrong with configs that cannot be read, by task. None: the first is an error.

    Raises:
        ChainError: no such repository, revision or file; no network and nothing in the cache.
    """
    found = Fetched(strict=strict, damaged=damaged)
    if is_on_hub(source):
        _add_repository(found, str(source), access, tasks)
        return found
    adapters, manifest, found.left_out = find_chain(source, damaged)
    found.manifest.update(manifest)
    wanted = {task: manifest[task] for task in with_history(manifest, tasks)} if _is_pinned(manifest) else {}
    for adapter in [*_pinned(wanted, access, damaged), *adapters]:
        found.add(adapter, manifest.get(adapter.name))
    return found


def fetch_each(sources: Sequence[Source], access: Access, strict: bool) -> Fetched:
    """What several adapter folders and repositories hold together, oldest first.

    Raises:
        ChainError: as `fetch`, or two sources that do not fit each other.
    """
    found = Fetched(strict=strict)
    for source in sources:
        if is_on_hub(source):
            _add_repository(found, source, access, None)
        else:
            found.add(find_chain([source]).adapters[0], None)
    return found


def _add_repository(found: Fetched, repo: str, access: Access, tasks: Sequence[str] | None) -> None:
    root = access.snapshot(repo, [MANIFEST_NAME])
    manifest = read_manifest(root) or {}
    wanted = {task: manifest[task] for task in with_history(manifest, tasks)} if manifest else {}
    own = {task: entry["folder"] for task, entry in wanted.items() if "repo_id" not in entry}
    patterns = (
        _files_in(list(own.values())) if manifest else [*ADAPTER_FILES, *(f"*/{name}" for name in ADAPTER_FILES)]
    )
    root = access.snapshot(repo, patterns, revision=root.name)
    if manifest:
        adapters = read_each([(task, root / place) for task, place in own.items()], found.damaged)
    else:
        adapters = find_chain(root, found.damaged).adapters
    for adapter in adapters:
        folder = ROOT if adapter.path == root else adapter.path.name
        _mark(adapter, repo, root.name, folder, manifest.get(adapter.name))
    place = {task: index for index, task in enumerate(wanted)}
    both = [*_pinned(wanted, access, found.damaged), *adapters]
    for adapter in sorted(both, key=lambda adapter: place.get(adapter.name, len(place))):
        found.add(adapter, manifest.get(adapter.name))


def _is_pinned(manifest: Mapping[str, Mapping[str, Any]]) -> bool:
    return any("repo_id" in entry for entry in manifest.values())


def _pinned(
    manifest: Mapping[str, Mapping[str, Any]], access: Access, damaged: dict[str, str] | None
) -> list[AdapterFile]:
    """The tasks that lie in other repositories, at the commits that the manifest names."""
    found = []
    for task, entry in manifest.items():
        if "repo_id" in entry:
            folder = entry["folder"]
            root = access.snapshot(entry["repo_id"], _files_in([folder]), revision=entry["revision"])
            for adapter in read_each([(task, root if folder == ROOT else root / folder)], damaged):
                _mark(adapter, entry["repo_id"], entry["revision"], folder, entry)
                found.append(adapter)
    return found


def _files_in(folders: Sequence[str]) -> list[str]:
    """Patterns of the files that an adapter consists of."""
    return [
        name if folder == ROOT else f"{glob.escape(folder)}/{name}" for folder in folders for name in ADAPTER_FILES
    ]


def _mark(adapter: AdapterFile, repo: str, revision: str, folder: str, entry: Mapping[str, Any] | None) -> None:
    """The adapter's config says where it is from."""
    if not adapter.is_stock:
        digest = weights_hash(adapter.weights()) if entry is None else entry["sha256"]
        adapter.config.origin = {"repo_id": repo, "revision": revision, "folder": folder, "sha256": digest}


@contextmanager
def said_clearly(repo: str, revision: str | None = None) -> Iterator[None]:
    """The client's errors as ones that say what to do.

    Raises:
        ChainError: instead of an error of huggingface_hub.
    """
    try:
        yield
    except GatedRepoError as error:
        raise ChainError(f"{repo} is gated: ask for access on its page, and log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ChainError(
            f"There is no folder {repo!r} on this machine and no repository of that name on the Hub that you may "
            "read. If it is private, log in with `hf auth login` or pass token=."
        ) from error
    except RevisionNotFoundError as error:
        raise ChainError(f"{repo} has no revision {revision!r}. Look at its commits, or leave it out.") from error
    except LocalEntryNotFoundError as error:
        raise ChainError(
            f"There is no folder {repo!r} on this machine; as a repository it is not in the cache, or not all of it, "
            "and the Hub cannot be reached. Load it once while online."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ChainError(f"The Hub answered {status} for {repo}: {error}. Try again later.") from error
