"""A chain on the Hugging Face Hub: fetched at pinned commits, pushed in one commit, with a model card."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .export import export_lora
from .manifest import (
    MANIFEST_NAME,
    README_NAME,
    REPO_ID,
    ROOT,
    ChainError,
    Manifest,
    Place,
    find_in_folder,
    read_manifest,
    with_history,
    write_manifest,
)
from .save import EXPORT, PICTURE, model_card, refuse_loss, save_chain

Source = str | os.PathLike[str]
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


class Access(NamedTuple):
    """`revision`, `token`, `cache_dir` and `local_files_only`, as in huggingface_hub."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def snapshot(self, repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
        """These files of a repository, in the cache; `ChainError` if there is none, or it is not in the cache."""
        options = {**self._asdict(), "revision": revision or self.revision}
        try:
            return Path(snapshot_download(repo, allow_patterns=list(patterns), library_name="peft-aso", **options))
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            raise ChainError(
                f"{repo!r} is no folder on this machine, and no repository that can be read: it does not exist, is "
                "private (log in with `hf auth login` or pass token=), or is not in the cache while offline."
            ) from error


def is_on_hub(source: Source | Sequence[Source]) -> TypeGuard[str]:
    """Whether a source is the id of a repository and no folder of this machine."""
    return isinstance(source, str) and REPO_ID.fullmatch(source) is not None and not Path(source).exists()


def find(source: Source | Sequence[Source], access: Access, tasks: Sequence[str] | None = None) -> list[Place]:
    """The adapters of a chain's folder or repository, or of a list of them; what a `chain.json` pins elsewhere too.

    With `tasks` of a single source only these, and what they were trained on top of.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not source:
            raise ChainError("The list of folders and repositories is empty. Give at least one, oldest task first.")
        places = []
        for each in source:
            is_adapter = not is_on_hub(each) and Path(each, CONFIG_NAME).exists()
            places += [Place(Path(each))] if is_adapter else find(each, access)
        return places
    if not is_on_hub(source):
        places = find_in_folder(Path(source), tasks)
    else:
        root = access.snapshot(source, [MANIFEST_NAME])
        manifest = read_manifest(root)
        if manifest is None:
            patterns = [*ADAPTER_FILES, *(f"*/{name}" for name in ADAPTER_FILES)]
        else:
            wanted = with_history({task: entry["history"] for task, entry in manifest.tasks.items()}, tasks)
            entries = [manifest.tasks[task] for task in wanted]
            patterns = [name for entry in entries if "repo_id" not in entry for name in _files_in(entry["folder"])]
        root = access.snapshot(source, patterns, root.name)  # the same commit
        places = [
            place._replace(origin=_origin(source, root.name, str(place.path.relative_to(root))))
            for place in find_in_folder(root, tasks)
        ]
    for number, place in enumerate(places):
        if place.entry and "repo_id" in place.entry:
            repo, revision, folder = (place.entry[key] for key in ("repo_id", "revision", "folder"))
            path = access.snapshot(repo, _files_in(folder), revision) / folder
            places[number] = Place(path, place.entry, _origin(repo, revision, folder), pinned=True)
    return places


def _origin(repo: str, revision: str, folder: str) -> dict[str, str]:
    return {"repo_id": repo, "revision": revision, "folder": folder}


def _files_in(folder: str) -> list[str]:
    return [name if folder == ROOT else f"{glob.escape(folder)}/{name}" for name in ADAPTER_FILES]


def push_chain(
    model: Any, repo_id: str, *, tasks: Sequence[str] | None = None, per_task: bool = False, merged: bool = True,
    overwrite: bool = False, accuracy: Mapping[str, float] | None = None, private: bool | None = None,
    token: str | bool | None = None, commit_message: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Push tasks with their history to the Hub.

    One repository: a folder a task, `merged/` (one stock LoRA adapter, the sum of all), a model card and `chain.json`,
    in one commit. Or one repository a task, `repo_id` with `-<task>` after it: the adapter is at the root, and its
    `chain.json` pins the commits of its history. Tasks that were loaded from the Hub and have not changed are pinned
    where they are.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        repo_id: "user/chain"; made if it does not exist.
        tasks: which tasks (their history must be among them). None: all.
        per_task: one repository a task.
        merged: whether the sum goes along (one repository only).
        overwrite: whether tasks that the repository's `chain.json` lists, and that are not pushed now, are removed.
            `remove_task` allows it for its task.
        accuracy: of tasks, in percent, for the card.
        private: of a repository that is made.
        token, commit_message: as in huggingface_hub; by default a message that names the newest task.

    Returns:
        Repository to the commit that holds the chain now.

    Raises:
        ChainError: before anything is pushed: what `save_chain` and `export_lora` refuse, or tasks would be lost.
        huggingface_hub.errors.HfHubHTTPError: no right to write; somebody else pushed in between (status 412); the
            connection broke. That repository is as it was; with `per_task` those of earlier tasks are pushed.
    """
    api = HfApi(token=token, library_name="peft-aso")
    with tempfile.TemporaryDirectory(prefix="peft-aso-push-") as scratch:
        folder = save_chain(model, Path(scratch, "chain"), tasks)
        manifest = read_manifest(folder) or Manifest({})
        pins: dict[str, dict[str, Any]] = {}  # tasks that are on the Hub
        pushes = {repo_id: list(manifest.tasks)}  # repository -> tasks, the newest last
        if per_task:
            for config in model.peft_config.values():
                entry = manifest.tasks.get(config.task_name)
                if entry and config.origin is not None and config.origin["sha256"] == entry["sha256"]:
                    origin = {key: config.origin[key] for key in ("repo_id", "revision", "folder")}
                    pins[config.task_name] = {**entry, **origin}
            new = {task: entry["history"] for task, entry in manifest.tasks.items() if task not in pins}
            pushes = {f"{repo_id}-{task}": [*history, task] for task, history in new.items()}
        elif merged:
            try:
                export_lora(model, folder / EXPORT, tasks=list(manifest.tasks))
            except ChainError as error:
                raise ChainError(f"{error} Or push without the sum of all: merged=False.") from error
        heads, old_folders = {}, {}
        for repo, names in pushes.items():  # all are checked before one is written
            heads[repo], there = _newest(api, repo)
            refuse_loss(there, names, model.base_model.removed_tasks, overwrite, repo)
            own = [entry["folder"] for entry in there.tasks.values() if "repo_id" not in entry]
            old_folders[repo] = [name for name in own if name != ROOT]
        commits: dict[str, str] = {}
        for repo, names in pushes.items():
            task, part, content = names[-1], folder, manifest
            if per_task:  # each pins the commits of its history, which are there by now
                entry = manifest.tasks[task]
                part = folder / entry["folder"]
                history = {old: pins[old] for old in manifest.tasks if old in entry["history"]}
                content = manifest._replace(tasks={**history, task: {**entry, "folder": ROOT}})
                write_manifest(part, content, Path(scratch))
            draw(list(content.tasks.values()), part / PICTURE)
            model_card(repo, part, content, model, accuracy or {}).save(part / README_NAME)
            api.create_repo(repo, private=private, exist_ok=True)
            commits[repo] = api.upload_folder(
                repo_id=repo, folder_path=part, commit_message=commit_message or f"Tasks up to {task}",
                parent_commit=heads[repo] or api.model_info(repo).sha,
                delete_patterns=[f"{glob.escape(name)}/*" for name in old_folders[repo]],  # what is not uploaded anew
            ).oid  # fmt: skip
            pins[task] = {**manifest.tasks[task], **_origin(repo, commits[repo], ROOT)}
        return commits


def _newest(api: HfApi, repo: str) -> tuple[str | None, Manifest]:
    """The newest commit of a repository (None if there is no repository), and its `chain.json`."""
    try:
        head = str(api.model_info(repo).sha)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None, Manifest({})
    return head, read_manifest(Access(token=api.token).snapshot(repo, [MANIFEST_NAME], head)) or Manifest({})


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the tasks' similarities; False where there are none, or no matplotlib."""
    found = {entry["task"]: entry["similarities"] for entry in entries if entry.get("similarities")}
    if not found:
        return False
    try:
        from ..plots import plot_similarity

        figure: Any = plot_similarity(found, [entry["task"] for entry in entries]).figure
    except ImportError:
        return False
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True
