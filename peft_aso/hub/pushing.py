"""`push_chain`: tasks, card and manifest in one commit, so that readers see the old chain or the new one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..chain.errors import ChainError
from ..chain.export import export_lora
from ..chain.manifest import MANIFEST_NAME, ROOT, read_base_model, read_manifest, write_manifest
from ..chain.removing import was_replaced
from ..chain.saving import save_chain
from .card import PICTURE, check, model_card
from .fetching import Access, said_clearly

EXPORT = "merged"
_CONFLICT = 412


def push_chain(
    model: Any,
    repo_id: str,
    *,
    tasks: Sequence[str] | None = None,
    per_task: bool = False,
    merged: bool = True,
    accuracy: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> dict[str, str]:
    """Push tasks with their history to the Hub.

    One repository: a folder a task, `merged/` (one stock LoRA adapter, the sum of all), a model card, and
    `chain.json`, in one commit. Or one repository a task, `repo_id` with `-<task>` after it: the adapter lies at
    the root, and its `chain.json` pins the commits of its history; tasks that were loaded from the Hub and have
    not changed are pinned where they are and not pushed again.

    Args:
        model: a `PeftModel` with ASO_LORA adapters.
        repo_id: "user/chain"; made if it does not exist.
        tasks: which tasks (their history must be among them). None: all.
        per_task: one repository a task.
        merged: whether the sum goes along (one repository only).
        accuracy: of tasks, in percent, for the card.
        private: of a repository that is made.
        token: None: the one of `hf auth login`.
        commit_message: None: one that names the newest task.

    Returns:
        Repository to the commit that holds the chain now.

    Raises:
        ChainError: before anything is pushed: what `save_chain` and `export_lora` refuse; no right to write; a
            repository holds a task that the model has not, or has with other weights. And when somebody else
            pushed in between, or the connection broke: that repository is as it was (empty, where it was made), and
            with `per_task` those of earlier tasks are pushed and will not be again.
    """
    with tempfile.TemporaryDirectory(prefix="peft-aso-push-") as scratch:
        folder = save_chain(model, Path(scratch, "chain"), tasks)
        manifest = read_manifest(folder) or {}
        base = read_base_model(folder)
        hub = _Hub(model, token, private)
        if per_task:
            return _push_each(hub, model, repo_id, folder, manifest, base, accuracy, commit_message)
        if merged:
            try:
                export_lora(model, folder / EXPORT, tasks=list(manifest))
            except ChainError as error:
                raise ChainError(f"{error} Or push without the sum of all: merged=False.") from error
            write_manifest(folder, list(manifest.values()), base, [EXPORT])
        message = commit_message or f"Chain of {len(manifest)} tasks, up to {list(manifest)[-1]}"
        place = hub.look(repo_id, manifest)
        commit = hub.push(place, folder, manifest, base, message, accuracy, EXPORT if merged else None)
        return {repo_id: commit}


def _push_each(
    hub: _Hub, model: Any, repo_id: str, folder: Path, manifest: dict[str, dict[str, Any]], base: str | None,
    accuracy: Mapping[str, float] | None, message: str | None,
) -> dict[str, str]:  # fmt: skip
    """One repository a task, oldest first, so that each pins the commits of its history; all are looked at before."""
    origins = {config.task_name: config.origin for config in model.peft_config.values()}
    pins: dict[str, dict[str, Any]] = {}
    places = {}
    for task, entry in manifest.items():
        origin = origins.get(task)
        if origin is not None and origin["sha256"] == entry["sha256"]:
            pins[task] = {**entry, **{name: origin[name] for name in ("repo_id", "revision", "folder")}}
        else:
            kept = {old: manifest[old] for old in manifest if old in (*entry["history"], task)}
            places[task] = hub.look(f"{repo_id}-{task}", kept)
    commits = {}
    for task, place in places.items():
        entry, source = manifest[task], folder / manifest[task]["folder"]
        entries = [*(pins[old] for old in manifest if old in entry["history"]), {**entry, "folder": ROOT}]
        write_manifest(source, entries, base)
        own = {each["task"]: each for each in entries}
        commit = hub.push(place, source, own, base, message or f"Task {task}", accuracy, None)
        commits[place.repo] = commit
        pins[task] = {**entry, "repo_id": place.repo, "revision": commit, "folder": ROOT}
    return commits


@dataclass(frozen=True)
class _Place:
    """A repository as it was looked at.

    Attributes:
        head: its newest commit; None where there is no such repository.
        gone: folders in it of tasks that were taken out on purpose.
    """

    repo: str
    head: str | None
    gone: Sequence[str] = ()


class _Hub:
    """A client, and what is to be done with a repository."""

    def __init__(self, model: Any, token: str | bool | None, private: bool | None) -> None:
        self.model = model
        self.api = HfApi(token=token, library_name="peft-aso")
        self.token, self.private = token, private

    def look(self, repo: str, manifest: Mapping[str, Mapping[str, Any]]) -> _Place:
        """Read what is there and see that nothing goes but what was taken out on purpose; nothing is written."""
        with _writing(repo):
            try:
                head = str(self.api.model_info(repo).sha)
            except GatedRepoError:  # it is there, and may not be read
                raise
            except RepositoryNotFoundError:
                return _Place(repo, None)
        return _Place(repo, head, self._refuse_others(repo, head, manifest))

    def push(
        self, place: _Place, folder: Path, manifest: Mapping[str, Mapping[str, Any]], base: str | None, message: str,
        accuracy: Mapping[str, float] | None, export: str | None,
    ) -> str:  # fmt: skip
        """Commit a folder as it stands, with a card; the new revision (the old one where nothing changed)."""
        repo, head = place.repo, place.head
        entries = list(manifest.values())
        picture = draw(entries, folder / PICTURE)
        card = model_card(repo, entries, base, export=export, accuracy=accuracy, picture=picture)
        check(card)
        (folder / "README.md").write_text(card, encoding="utf-8")
        deletions = [CommitOperationDelete(f"{each}/", is_folder=True) for each in place.gone]
        with _writing(repo):
            self.api.create_repo(repo, private=self.private, exist_ok=True)
            commit = self.api.create_commit(
                repo, [*deletions, *_additions(folder)], commit_message=message,
                parent_commit=head or self.api.model_info(repo).sha,
            )  # fmt: skip
        return str(commit.oid)

    def _refuse_others(self, repo: str, head: str, manifest: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """See that nothing goes but what was taken out on purpose; the folders of that."""
        there = read_manifest(Access(token=self.token).snapshot(repo, [MANIFEST_NAME], revision=head)) or {}
        on_purpose = {task for task, entry in there.items() if was_replaced(self.model, task, entry)}
        lost = [task for task in there if task not in manifest]
        changed = [t for t, entry in there.items() if t in manifest and entry["sha256"] != manifest[t]["sha256"]]
        refused = {
            "has {}, which this model has not": [task for task in lost if task not in on_purpose],
            "has other weights for {}": [task for task in changed if task not in on_purpose],
        }
        if any(refused.values()):
            what = " and ".join(text.format(", ".join(map(repr, names))) for text, names in refused.items() if names)
            raise ChainError(
                f"{repo} {what}. Nothing was pushed. Push to another repository, or load that chain first "
                f'(load_chain(base, "{repo}")) and train on top of it.'
            )
        return [there[task]["folder"] for task in lost if "repo_id" not in there[task]]


def _additions(folder: Path) -> list[CommitOperationAdd]:
    """All files of a folder, the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path == folder / MANIFEST_NAME)
    names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MANIFEST_NAME, PICTURE)
    kept = [path for path in files if path.name in names or path == folder / "README.md"]
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in kept]


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the tasks' similarities; False where there are none, or no matplotlib."""
    found = {entry["task"]: entry["similarities"] for entry in entries if entry.get("similarities")}
    if not found:
        return False
    try:
        from ..plots import plot_similarity

        axes = plot_similarity(found, [entry["task"] for entry in entries])
    except ImportError:
        return False
    figure: Any = axes.figure
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True


@contextmanager
def _writing(repo: str) -> Iterator[None]:
    """The client's errors while it writes, as ones that say what to do."""
    try:
        with said_clearly(repo):
            yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ChainError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status == _CONFLICT:
            raise ChainError(
                f"Somebody pushed to {repo} in between. Nothing of yours was written to it: look at what is there "
                "now, and push again."
            ) from cause
        if status in (401, 403):
            raise ChainError(
                f"You may not write to {repo} (the Hub answered {status}). Log in with `hf auth login`, or pass a "
                "token= with the right to write."
            ) from cause
        raise ChainError(
            f"The push to {repo} broke off ({type(cause).__name__}: {cause}). Its readers see what was there "
            "before. Push again: files that have arrived are not sent twice."
        ) from cause
