"""What lies in a chain's folder beside the tasks that were saved last: what stays in the chain, what is left out.

Saving deletes nothing, so a folder may hold adapters of another chain, or ones that were trained on top of weights
that are no longer there. The manifest names them with a hash, and loading passes over them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import ChainError
from .manifest import Listing, weights_hash
from .reading import AdapterFile, read_adapter, refuse_escape, subfolders


def beside(
    folder: Path, earlier: Listing, saved: Mapping[str, str], without: Collection[str]
) -> tuple[list[AdapterFile], dict[str, str | None]]:
    """Sort out what a folder holds beside the tasks that are being saved into it.

    A task that was listed stays in the chain if it was trained on top of tasks that are in the chain now, with the
    weights that they have now. Everything else is left out.

    Args:
        earlier: what was listed.
        saved: task -> SHA-256 of the weights that are being saved.
        without: folders that go.

    Returns:
        The adapters that stay, oldest first; folder -> SHA-256 of the others' weights (None: they cannot be read).
    """
    if not folder.is_dir():
        return [], {}
    known = {*saved, *without, *earlier.exports}
    others = {place.name: _look(place) for place in subfolders(folder) if place.name not in known}
    staying, hashes = list[AdapterFile](), dict(saved)
    trained_on = {task: entry["sha256"] for task, entry in earlier.tasks.items()}
    for task, entry in earlier.tasks.items():
        adapter, digest = others.get(entry["folder"], (None, None))
        if adapter is None or (adapter.name, adapter.history, digest) != (task, entry["history"], entry["sha256"]):
            continue
        history = adapter.history
        if task not in hashes and history and all(hashes.get(old) == trained_on.get(old, "") for old in history):
            staying.append(adapter)
            hashes[task] = entry["sha256"]
            del others[entry["folder"]]
    return staying, {name: digest for name, (_, digest) in others.items()}


def left_out_of(folder: Path, listing: Listing) -> list[str]:
    """The folders that the listing leaves out; one that was given other weights since is not among them."""
    if not listing.left_out:
        return []
    places = [place for place in subfolders(folder) if place.name in listing.left_out]
    return [place.name for place in places if _look(place)[1] == listing.left_out[place.name]]


def _look(place: Path) -> tuple[AdapterFile | None, str | None]:
    """An adapter and the SHA-256 of its weights; nothing where it cannot be read, which is no reason not to save."""
    try:
        refuse_escape(place.parent, place)
        adapter = read_adapter(place)
        return adapter, weights_hash(adapter.weights())
    except (ChainError, OSError):
        return None, None
