"""A folder is replaced whole or not at all, and nothing else in it is lost."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from peft_aso.chain import ChainError, atomic
from peft_aso.chain.atomic import replaced_folder
from tests.chain.chains import killed_in_a_child


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "chain"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "weights").write_text("old")
    (folder / "task" / "stale").write_text("old")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "mine.txt").write_text("mine")
    (folder / "list.txt").write_text("mine too")
    os.symlink("list.txt", folder / "link")
    return folder


def write_new(folder: Path) -> None:
    with replaced_folder(folder) as stage:
        (stage / "task").mkdir()
        (stage / "task" / "weights").write_text("new")


def check_new(folder: Path) -> None:
    assert content(folder) == {
        "task/weights": "new",
        "notes/deep/mine.txt": "mine",
        "list.txt": "mine too",
        "link": "mine too",
    }
    assert (folder / "link").is_symlink()
    assert os.listdir(folder.parent) == ["chain"]


def test_new_folder_with_parents(tmp_path: Path) -> None:
    write_new(tmp_path / "a" / "b")
    assert content(tmp_path) == {"a/b/task/weights": "new"}


def test_replaces_what_was_written_and_keeps_the_rest(old: Path) -> None:
    write_new(old)
    check_new(old)


def test_without_exchange_of_names(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    write_new(old)
    check_new(old)


def test_without_hard_links(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    write_new(old)
    check_new(old)


def test_through_a_link_to_the_folder(old: Path, tmp_path: Path) -> None:
    os.symlink(old, tmp_path / "alias")
    write_new(tmp_path / "alias")
    assert (tmp_path / "alias").is_symlink()
    assert content(old)["task/weights"] == "new"


@pytest.mark.parametrize("failing", ["_flush", "_keep_others", "_take_place"])
def test_failure_leaves_everything(old: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = content(old)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_new(old)
    assert content(old) == before
    assert os.listdir(old.parent) == ["chain"]


def test_failed_second_rename_is_undone(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = content(old), os.rename
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == old and ".old" not in Path(source).name:
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="broken disk"):
        write_new(old)
    assert content(old) == before
    assert os.listdir(old.parent) == ["chain"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ChainError, match="is a file"), replaced_folder(tmp_path / "file"):
        raise AssertionError("must not start")
    assert content(tmp_path) == {"file": "mine"}


def test_files_written_meanwhile_are_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = atomic._take_place

    def late(stage: Path, target: Path, without: Any) -> None:
        (target / "late.txt").write_text("late")
        take(stage, target, without)

    monkeypatch.setattr(atomic, "_take_place", late)
    write_new(old)
    assert content(old)["late.txt"] == "late"


def test_what_shall_go_is_not_kept(old: Path) -> None:
    (old / "gone").mkdir()
    (old / "gone" / "file").write_text("old")
    (old / "kept.txt").write_text("kept")
    with replaced_folder(old, without=["gone"]) as stage:
        (stage / "new.txt").write_text("new")
    assert not (old / "gone").exists() and (old / "kept.txt").exists() and (old / "new.txt").exists()


def test_exchange_swaps_or_says_that_it_cannot(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    swapped = atomic._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "file").read_text() == ("two" if swapped else "one")
    assert (tmp_path / "two" / "file").read_text() == ("one" if swapped else "two")


def test_killed_while_writing(old: Path) -> None:
    before = content(old)

    def die() -> None:
        with replaced_folder(old) as stage:
            (stage / "task").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)

    killed_in_a_child(die)
    assert content(old) == before
