"""Replace a folder in one step: write beside it, flush to disk, then exchange the two names.

Whatever happens on the way (an exception, a full disk, a killed process), the folder's name leads to the old
content, complete, or to the new content, complete.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ChainError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# what a kernel or file system that cannot exchange two names answers with
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


@contextmanager
def replaced_folder(folder: str | os.PathLike[str], without: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write into; on leaving without an error it takes the place of `folder`.

    Files and folders in the old `folder` that were not written anew are kept as they are, but for those called as in
    `without`. After an error the old folder is as it was and nothing of the new one is left behind.

    Raises:
        ChainError: `folder` is a file.
        OSError: the disk is full, or the place cannot be written to.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise ChainError(f"{folder} is a file. Give the name of a folder; it is made if it does not exist.")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.tmp-{secrets.token_hex(6)}")
    stage.mkdir()
    try:
        yield stage
        _flush(stage)
        if target.exists():
            _keep_others(target, stage, without)
            os.chmod(stage, stat.S_IMODE(target.stat().st_mode))
            _sync(stage)
        _take_place(stage, target, without)
    except BaseException:  # Ctrl-C too: nothing half-written stays, and the error goes on
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _sync(target.parent)


def _keep_others(target: Path, stage: Path, without: Collection[str]) -> None:
    """Everything in `target` that `stage` does not have, also in `stage`: as links, so no data is copied."""
    for entry in target.iterdir():
        copy = stage / entry.name
        if entry.name in without or copy.exists() or copy.is_symlink():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        else:
            _link(entry, copy)


def _link(source: str | os.PathLike[str], copy: str | os.PathLike[str]) -> str:
    try:
        os.link(source, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):  # another disk, or a file system without hard links
        shutil.copy2(source, copy, follow_symlinks=False)
    return str(copy)


def _take_place(stage: Path, target: Path, without: Collection[str] = ()) -> None:
    """`stage` becomes `target`; what `target` held is removed."""
    if not target.exists():
        os.rename(stage, target)
        return
    if _exchange(stage, target):
        old = stage
    else:
        old = stage.with_name(stage.name + ".old")
        os.rename(target, old)
        try:
            os.rename(stage, target)
        except BaseException:  # Ctrl-C too: the old folder is back in its place, and the error goes on
            os.rename(old, target)
            raise
    for entry in old.iterdir():  # written by somebody else while we were writing
        if entry.name not in without and not (target / entry.name).exists() and not (target / entry.name).is_symlink():
            os.rename(entry, target / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux's renameat2). False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flush(folder: Path) -> None:
    """Files and folders below `folder` are on the disk when this returns."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(place))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
