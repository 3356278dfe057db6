"""The last act of staged(): a rename that fails, is not sure to last, or meets another build."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.artifact import staging
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.staging import check_place, staged
from h1export.errors import H1ExportError

KEY = "0123456789abcdef"
OTHER_KEY = "fedcba9876543210"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fill(out: Path, target: str, force: bool = False, key: str = KEY) -> None:
    """Build a folder with as much of a manifest as tells an artifact from other folders."""
    with staged(out, force, key) as folder:
        (folder / MANIFEST).write_text(json.dumps({"format": 1, "target": target, "files": {}}), encoding="utf-8")


def content(out: Path) -> str:
    return str(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["target"])


def left_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a system that cannot swap two folders in one step."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


def sync_fails(out: Path, monkeypatch: pytest.MonkeyPatch, number: int = errno.EIO) -> None:
    """Let the folder that holds ``out`` never reach the disk."""
    fsync = os.fsync

    def failing(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), out.parent.stat()):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.parametrize("steps", ["one step", "three steps"])
@pytest.mark.parametrize("old", [False, True], ids=["nothing", "an artifact"])
def test_a_rename_that_may_not_last_is_undone(
    old: bool, steps: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        fill(out, "old")
    if steps == "three steps":
        without_exchange(monkeypatch)
    sync_fails(out, monkeypatch)
    with pytest.raises(H1ExportError, match=r"out: cannot be written \(Input/output error\)"):
        fill(out, "new", force=old)
    assert left_in(out) == (["out"] if old else [])
    assert not old or content(out) == "old"


def test_a_rename_that_cannot_be_undone_either_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def once(self: Path, target: Path) -> Path:
        if self == out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    sync_fails(out, monkeypatch)
    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(H1ExportError, match="cannot be written"):
        fill(out, "new")
    assert left_in(out) == []


def test_a_replacement_that_cannot_be_undone_is_whole_and_says_so(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    exchange = staging._exchange
    calls: list[Path] = []

    def once(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        exchange(a, b)

    with monkeypatch.context() as patched:
        sync_fails(out, patched)
        patched.setattr(staging, "_exchange", once)
        with pytest.raises(H1ExportError, match="out: is complete, but may be lost if the machine stops now"):
            fill(out, "new", force=True)
    assert content(out) == "new"
    fill(out, "newer", force=True)
    assert left_in(out) == ["out"]
    assert content(out) == "newer"


def test_a_file_system_that_flushes_no_folders_is_no_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync_fails(out, monkeypatch, errno.EINVAL)
    fill(out, "new")
    assert content(out) == "new"


@pytest.mark.parametrize("number", range(3), ids=["first", "second", "third"])
def test_any_of_three_renames_may_fail(number: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    without_exchange(monkeypatch)
    rename = Path.rename
    calls: list[Path] = []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == number + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(H1ExportError, match="No space left"):
        fill(out, "new", force=True)
    assert content(out) == "old"
    assert left_in(out) == ["out"]


def after_the_last_check(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call ``act`` once, right after a build has checked OUT for the last time."""
    check = staging.check_place
    calls: list[Path] = []

    def checked(out: Path, force: bool) -> None:
        check(out, force)
        calls.append(out)
        if len(calls) == 2:
            act()

    monkeypatch.setattr(staging, "check_place", checked)


@pytest.mark.parametrize("force", [False, True])
def test_a_build_that_finishes_in_between_is_replaced_with_force_only(
    force: bool, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_the_last_check(monkeypatch, lambda: fill(out, "faster", key=OTHER_KEY))
    if force:
        fill(out, "slower", force=True)
    else:
        with pytest.raises(H1ExportError, match="out: exists; choose another OUT, or replace it with --force"):
            fill(out, "slower")
    assert content(out) == ("slower" if force else "faster")
    assert left_in(out) == ["out"]


def test_what_goes_away_in_between_is_no_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    after_the_last_check(monkeypatch, lambda: shutil.rmtree(out))
    fill(out, "new", force=True)
    assert content(out) == "new"
    assert left_in(out) == ["out"]


def test_two_replacements_at_once_lock_what_is_at_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second opens the old artifact just before the first replaces it: it must lock the new one."""
    fill(out, "old")
    lock = staging.portalocker.lock
    acted: list[bool] = []

    def locked(handle: int, flags: object) -> None:
        if flags == staging.LockFlags.EXCLUSIVE and not acted:
            acted.append(True)
            fill(out, "first", force=True, key=OTHER_KEY)
        lock(handle, flags)

    at: list[bool] = []
    exchange = staging._exchange

    def watched(a: Path, b: Path) -> None:
        handle = os.open(b, os.O_RDONLY)
        try:
            lock(handle, staging.NOW)
            at.append(False)  # what is about to be put aside is not locked
        except staging.portalocker.AlreadyLocked:
            at.append(True)
        finally:
            os.close(handle)
        exchange(a, b)

    monkeypatch.setattr(staging.portalocker, "lock", locked)
    monkeypatch.setattr(staging, "_exchange", watched)
    fill(out, "second", force=True)
    assert at == [True, True]
    assert content(out) == "second"
    assert left_in(out) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_the_root_is_no_place_of_a_build(force: bool) -> None:
    with pytest.raises(H1ExportError, match="/: is not an artifact" if force else "/: exists"):
        check_place(Path("/"), force)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.__getitem__)
def test_a_write_that_fails_names_out(number: int, out: Path) -> None:
    """The system names no file where a write fails, and the source where a copy does."""
    errors = [
        OSError(number, os.strerror(number)),
        OSError(number, os.strerror(number), "/a/source", None, str(out.parent / f".out.partial-{KEY}" / "copy")),
        OSError(number, os.strerror(number), str(out.parent / f".out.partial-{KEY}" / "new")),
    ]
    for error in errors:
        with pytest.raises(H1ExportError, match=r"out: cannot be written \(") as caught, staged(out, False, KEY):
            raise error
        assert caught.value.where == str(out)
    elsewhere = OSError(number, os.strerror(number), "/a/source")
    with pytest.raises(OSError, match="/a/source"), staged(out, False, KEY):
        raise elsewhere
    assert left_in(out) == []
