"""A chain on the Hugging Face Hub: fetched at pinned commits, pushed in one commit, with a model card."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .export import README_NAME, export_lora
from .manifest import (
    MANIFEST_NAME,
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
from .save import refuse_loss, save_chain

Source = str | os.PathLike[str]
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
EXPORT = "merged"  # the folder of the sum of all tasks
PICTURE = "similarity.png"
_TAGS = ["continual-learning", "lora", "peft", "peft-aso", "aso-lora"]


# ---- fetching ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Access:
    """`revision`, `token`, `cache_dir` and `local_files_only`, as in huggingface_hub."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def snapshot(self, repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
        """These files of a repository, in the cache.

        Raises:
            ChainError: no such repository, or none in the cache while offline.
        """
        try:
            found = snapshot_download(
                repo, revision=revision or self.revision, token=self.token, cache_dir=self.cache_dir,
                local_files_only=self.local_files_only, allow_patterns=list(patterns), library_name="peft-aso",
            )  # fmt: skip
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            raise ChainError(
                f"{repo!r} is no folder on this machine, and no repository that can be read: it does not exist, is "
                "private (log in with `hf auth login` or pass token=), or is not in the cache while offline."
            ) from error
        return Path(found)


def is_on_hub(source: Source | Sequence[Source]) -> TypeGuard[str]:
    """Whether a source is the id of a repository and no folder of this machine."""
    return isinstance(source, str) and REPO_ID.fullmatch(source) is not None and not Path(source).exists()


def find(source: Source | Sequence[Source], access: Access, tasks: Sequence[str] | None = None) -> list[Place]:
    """The adapters of a chain's folder or repository, or of a list of them; what a `chain.json` pins elsewhere too.

    Args:
        tasks: of a single source only these, and what they were trained on top of.

    Raises:
        ChainError: no such folder or repository, a damaged `chain.json`.
        huggingface_hub.errors.HfHubHTTPError: what else goes wrong on the way.
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
    return [_pinned(place.entry, access) if place.entry and "repo_id" in place.entry else place for place in places]


def _pinned(entry: dict[str, Any], access: Access) -> Place:
    repo, revision, folder = entry["repo_id"], entry["revision"], entry["folder"]
    root = access.snapshot(repo, _files_in(folder), revision)
    return Place(root / folder, entry, _origin(repo, revision, folder), pinned=True)


def _origin(repo: str, revision: str, folder: str) -> dict[str, str]:
    return {"repo_id": repo, "revision": revision, "folder": folder}


def _files_in(folder: str) -> list[str]:
    return [name if folder == ROOT else f"{glob.escape(folder)}/{name}" for name in ADAPTER_FILES]


# ---- pushing ----------------------------------------------------------------------------------------------------


def push_chain(
    model: Any,
    repo_id: str,
    *,
    tasks: Sequence[str] | None = None,
    per_task: bool = False,
    merged: bool = True,
    overwrite: bool = False,
    accuracy: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> dict[str, str]:
    """Push tasks with their history to the Hub.

    One repository: a folder a task, `merged/` (one stock LoRA adapter, the sum of all), a model card and `chain.json`,
    in one commit. Or one repository a task, `repo_id` with `-<task>` after it: the adapter lies at the root, and its
    `chain.json` pins the commits of its history; tasks that were loaded from the Hub and have not changed are pinned
    where they are and not pushed again.

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
        token: None: the one of `hf auth login`.
        commit_message: None: one that names the newest task.

    Returns:
        Repository to the commit that holds the chain now.

    Raises:
        ChainError: before anything is pushed: what `save_chain` and `export_lora` refuse, or a repository that lists
            other tasks.
        huggingface_hub.errors.HfHubHTTPError: no right to write; somebody else pushed in between (status 412); the
            connection broke. That repository is as it was; with `per_task` those of earlier tasks are pushed.
    """
    with tempfile.TemporaryDirectory(prefix="peft-aso-push-") as scratch:
        folder = save_chain(model, Path(scratch, "chain"), tasks)
        manifest = read_manifest(folder) or Manifest({})
        push = _Push(HfApi(token=token, library_name="peft-aso"), model, private, overwrite, accuracy or {})
        if per_task:
            return _push_each(push, repo_id, folder, manifest, commit_message)
        if merged:
            try:
                export_lora(model, folder / EXPORT, tasks=list(manifest.tasks))
            except ChainError as error:
                raise ChainError(f"{error} Or push without the sum of all: merged=False.") from error
        message = commit_message or f"Chain of {len(manifest.tasks)} tasks, up to {list(manifest.tasks)[-1]}"
        return {repo_id: push.push(repo_id, push.check(repo_id, manifest.tasks), folder, manifest, message)}


def _push_each(push: _Push, repo_id: str, folder: Path, manifest: Manifest, message: str | None) -> dict[str, str]:
    """One repository a task, oldest first, so that each pins the commits of its history; all are checked before."""
    origins = {config.task_name: config.origin for config in push.model.peft_config.values()}
    pins, heads, commits = dict[str, dict[str, Any]](), dict[str, tuple[str | None, list[str]]](), dict[str, str]()
    for task, entry in manifest.tasks.items():
        origin = origins.get(task)
        if origin is not None and origin["sha256"] == entry["sha256"]:
            pins[task] = {**entry, **_origin(origin["repo_id"], origin["revision"], origin["folder"])}
        else:
            heads[task] = push.check(f"{repo_id}-{task}", [*entry["history"], task])
    for task, head in heads.items():
        entry, repo = manifest.tasks[task], f"{repo_id}-{task}"
        own = {old: pins[old] for old in manifest.tasks if old in entry["history"]}
        own[task] = {**entry, "folder": ROOT}
        write_manifest(folder / entry["folder"], manifest._replace(tasks=own))
        commits[repo] = push.push(
            repo, head, folder / entry["folder"], manifest._replace(tasks=own), message or f"Task {task}"
        )
        pins[task] = {**entry, **_origin(repo, commits[repo], ROOT)}
    return commits


@dataclass(frozen=True)
class _Push:
    """What all repositories of one call of `push_chain` share."""

    api: HfApi
    model: Any
    private: bool | None
    overwrite: bool
    accuracy: Mapping[str, float]

    def check(self, repo: str, tasks: Sequence[str] | Mapping[str, Any]) -> tuple[str | None, list[str]]:
        """The newest commit (None: no such repository) and the folders in it that go; nothing is written."""
        try:
            head = str(self.api.model_info(repo).sha)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None, []
        there = read_manifest(Access(token=self.api.token).snapshot(repo, [MANIFEST_NAME], head)) or Manifest({})
        refuse_loss(there, tasks, self.model.base_model.removed_tasks, self.overwrite, repo)
        own = [entry["folder"] for entry in there.tasks.values() if "repo_id" not in entry]
        return head, [folder for folder in own if folder != ROOT]

    def push(
        self, repo: str, head: tuple[str | None, list[str]], folder: Path, manifest: Manifest, message: str
    ) -> str:
        """Commit a folder with a card; the new commit (the old one where nothing changed)."""
        parent, folders = head
        has_picture = draw(list(manifest.tasks.values()), folder / PICTURE)
        card = model_card(repo, manifest, self.accuracy, (folder / EXPORT).exists(), has_picture)
        card.save(folder / README_NAME)
        self.api.create_repo(repo, private=self.private, exist_ok=True)
        commit = self.api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            parent_commit=parent or self.api.model_info(repo).sha,
            delete_patterns=[f"{glob.escape(name)}/*" for name in folders],  # what is not uploaded anew
        )
        return str(commit.oid)


# ---- model card -------------------------------------------------------------------------------------------------


def model_card(
    repo: str, manifest: Manifest, accuracy: Mapping[str, float], has_export: bool = False, has_picture: bool = False
) -> ModelCard:
    """What the chain is, how to load it and how to go on with it; `accuracy` of tasks is in percent."""
    base_model = manifest.base_model
    about = ModelCardData(base_model=base_model, base_model_relation="adapter", library_name="peft", tags=_TAGS)
    base = f'AutoModelForCausalLM.from_pretrained("{base_model or "the base model"}")'
    rows = [["", "task", "rank", "most like (w)", "weights", *(["accuracy"] if accuracy else [])]]
    for number, (task, entry) in enumerate(manifest.tasks.items(), start=1):
        place = f"`{entry['sha256'][:12]}`"
        if "repo_id" in entry:
            place += f" of [{entry['repo_id']}](https://huggingface.co/{entry['repo_id']}/tree/{entry['revision']})"
        row = [str(number), task, str(entry["rank"]), most_like(entry), place]
        rows.append([*row, *([f"{accuracy[task]:.1f}" if task in accuracy else ""] if accuracy else [])])
    parts = [
        f"---\n{about.to_yaml()}\n---\n\n# {repo}",
        f"A chain of {len(manifest.tasks)} tasks, learned one after another with ASO-LoRA "
        "([peft-aso](https://pypi.org/project/peft-aso/), [paper](https://aclanthology.org/2026.acl-long.842/)). Each "
        "task has its own LoRA adapter; the model is the base and the sum of all, without a task label.",
        markdown(rows),
        f"""## Load it, and go on

```python
from peft_aso import ASOLoraConfig, ASOTrainer, load_chain, push_chain
from transformers import AutoModelForCausalLM

base = {base}
model = load_chain(base, "{repo}")  # all tasks; the newest, {list(manifest.tasks)[-1]}, is active
model.add_adapter("new-task", ASOLoraConfig(task_type="CAUSAL_LM"))
model.set_adapter("new-task")  # the tasks above are its history: active, frozen
ASOTrainer(model=model, args=args, train_dataset=data).train()
push_chain(model, "you/new-chain")
```""",
    ]
    if has_export:
        load = f'PeftModel.from_pretrained({base}, "{repo}", subfolder="{EXPORT}")'
        parts.append(f"Without peft-aso: `{EXPORT}/` is one stock LoRA adapter, the sum of all tasks: `{load}`.")
    if has_picture:
        parts.append(f"![similarity of the tasks]({PICTURE})")
    return ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of one width; the first row is its head."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in lines
    )


def most_like(entry: Mapping[str, Any]) -> str:
    """The earlier task with the largest w, and that; empty where there is none."""
    values = {task: mean_of(value) for task, value in (entry.get("similarities") or {}).items()}
    best = max(values, key=values.__getitem__, default=None)
    return "" if best is None else f"{best} ({values[best]:.2f})"


def mean_of(value: Any) -> float:
    """A w or psi as one number: one for a task, or the mean of one a layer."""
    return sum(value) / len(value) if isinstance(value, list) else float(value)


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
