"""staged(): OUT appears complete or not at all, and replaces artifacts only."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.artifact.journal import JOURNAL, Extent, Journal
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.staging import staged
from h1export.errors import H1ExportError

KEY = "0123456789abcdef"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "some" / "place" / "out"


def manifest(target: str) -> str:
    """Return as much of a manifest as tells an artifact from other folders."""
    return json.dumps({"format": 1, "target": target, "files": {}})


def fill(out: Path, target: str = "new", force: bool = False) -> None:
    with staged(out, force, KEY) as folder:
        (folder / MANIFEST).write_text(manifest(target), encoding="utf-8")


def left_in(out: Path) -> list[str]:
    """Names beside and including ``out``, hidden ones too."""
    return sorted(path.name for path in out.parent.iterdir()) if out.parent.exists() else []


def content(out: Path) -> str:
    return str(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["target"])


def test_success(out: Path) -> None:
    """Missing parents are made, and nothing but OUT stays behind."""
    with staged(out, force=False, key=KEY) as folder:
        assert folder.parent == out.parent
        assert folder.is_dir()
        assert not out.exists()
        (folder / "a").write_text("b", encoding="utf-8")
    assert (out / "a").read_text(encoding="utf-8") == "b"
    assert left_in(out) == ["out"]


def test_a_relative_place(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that changes its directory still ends where it was meant to."""
    out.parent.mkdir(parents=True)
    monkeypatch.chdir(out.parent)
    with staged(Path("out"), force=False, key=KEY) as folder:
        (folder / MANIFEST).write_text(manifest("new"), encoding="utf-8")
        monkeypatch.chdir("/")
    assert content(out) == "new"


def fail(out: Path, error: BaseException, force: bool = False) -> None:
    """Run a build that raises ``error`` when it is half done."""
    with staged(out, force, KEY) as folder:
        (folder / MANIFEST).write_text(manifest("half"), encoding="utf-8")
        raise error


FAILURES = [
    RuntimeError("x"),
    H1ExportError("where", "what", "next"),
    KeyboardInterrupt(),
    SystemExit(1),
    MemoryError(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_leaves_nothing(error: BaseException, out: Path) -> None:
    with pytest.raises(type(error)) as caught:
        fail(out, error)
    assert caught.value is error
    assert left_in(out) == []


def test_a_failure_leaves_what_was_to_be_replaced(out: Path) -> None:
    fill(out, "old")
    with pytest.raises(RuntimeError, match="disk full"):
        fail(out, RuntimeError("disk full"), force=True)
    assert content(out) == "old"
    assert left_in(out) == ["out"]


THEIRS = manifest("theirs")


def occupied(out: Path, kind: str) -> Path:
    """Put something at ``out``, an artifact or not, and return the file inside or behind it that must survive."""
    out.parent.mkdir(parents=True)
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text(THEIRS, encoding="utf-8")
    if kind == "file":
        out.write_text(THEIRS, encoding="utf-8")
    elif kind == "link":
        out.symlink_to(elsewhere)
    elif kind == "dangling link":
        out.symlink_to(out.parent / "nowhere")
    else:
        out.mkdir()
        (out / kind).write_text(THEIRS, encoding="utf-8")
    return {"file": out, "link": elsewhere / MANIFEST, "dangling link": elsewhere / MANIFEST}.get(kind, out / kind)


@pytest.mark.parametrize("kind", [MANIFEST, "notes.txt", "file", "link", "dangling link"])
def test_without_force_nothing_is_replaced(kind: str, out: Path) -> None:
    survivor = occupied(out, kind)
    before = left_in(out)
    with pytest.raises(H1ExportError, match="out: exists; choose another OUT, or replace it with --force"):
        fill(out)
    assert survivor.read_text(encoding="utf-8") == THEIRS
    assert left_in(out) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_taken_place_is_refused_before_the_work_begins(force: bool, out: Path) -> None:
    occupied(out, "notes.txt")
    with pytest.raises(H1ExportError, match="out: "):
        fail(out, AssertionError("the build was begun"), force)


@pytest.mark.parametrize("kind", ["notes.txt", "file", "link", "dangling link"])
def test_force_replaces_nothing_but_artifacts(kind: str, out: Path) -> None:
    survivor = occupied(out, kind)
    before = left_in(out)
    with pytest.raises(H1ExportError, match="is not an artifact of h1export; --force replaces artifacts only"):
        fill(out, force=True)
    assert survivor.read_text(encoding="utf-8") == THEIRS
    assert left_in(out) == before


OTHER_MANIFESTS = [
    b'{"manifest_version": 3, "name": "an extension"}',
    b'{"format": 1}',
    b"[]",
    b"null",
    b"",
    b"\xff",
    b"[" * 200_000,
]


@pytest.mark.parametrize("theirs", OTHER_MANIFESTS, ids=lambda text: repr(text[:12]))
def test_force_spares_a_folder_with_another_programs_manifest(theirs: bytes, out: Path) -> None:
    """Browser extensions and web apps have a manifest.json too."""
    out.mkdir(parents=True)
    (out / MANIFEST).write_bytes(theirs)
    (out / "precious.js").write_text("theirs", encoding="utf-8")
    with pytest.raises(H1ExportError, match="is not an artifact"):
        fill(out, force=True)
    assert (out / "precious.js").read_text(encoding="utf-8") == "theirs"


def test_force_replaces_an_artifact(out: Path) -> None:
    fill(out, "old")
    (out / "old file").write_text("old", encoding="utf-8")
    with staged(out, force=True, key=KEY) as folder:
        (folder / MANIFEST).write_text(manifest("new"), encoding="utf-8")
        assert content(out) == "old"
    assert content(out) == "new"
    assert not (out / "old file").exists()
    assert left_in(out) == ["out"]


def test_force_replaces_an_empty_folder(out: Path) -> None:
    out.mkdir(parents=True)
    fill(out, force=True)
    assert content(out) == "new"
    assert left_in(out) == ["out"]


def test_force_with_nothing_to_replace(out: Path) -> None:
    fill(out, force=True)
    assert left_in(out) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_place_taken_during_the_build_is_not_replaced(force: bool, out: Path) -> None:
    def build() -> None:
        with staged(out, force, KEY) as folder:
            (folder / MANIFEST).write_text(manifest("late"), encoding="utf-8")
            out.mkdir()
            (out / "notes.txt").write_text("theirs", encoding="utf-8")

    with pytest.raises(H1ExportError, match="is not an artifact" if force else "out: exists"):
        build()
    assert (out / "notes.txt").read_text(encoding="utf-8") == "theirs"
    assert left_in(out) == ["out"]


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot swap two folders in one step."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


@pytest.mark.usefixtures("without_exchange")
def test_force_replaces_an_artifact_in_three_steps_too(out: Path) -> None:
    fill(out, "old")
    fill(out, "new", force=True)
    assert content(out) == "new"
    assert left_in(out) == ["out"]


@pytest.mark.usefixtures("without_exchange")
def test_a_rename_that_fails_puts_the_old_artifact_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and Path(target) == out and "aside" not in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((OSError, H1ExportError), match="No space"):
        fill(out, force=True)
    assert content(out) == "old"
    assert left_in(out) == ["out"]


def test_every_file_is_on_disk_before_the_rename(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is: files, folders from the inside out, the stage, the rename, the parent folder."""
    calls: list[str] = []
    fsync = os.fsync
    rename = Path.rename

    def watched_fsync(handle: int) -> None:
        calls.append(str(os.fstat(handle).st_ino))
        fsync(handle)

    def watched_rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    with staged(out, force=False, key=KEY) as folder:
        (folder / "a").write_text("1", encoding="utf-8")
        (folder / "b" / "c").mkdir(parents=True)
        (folder / "b" / "c" / "d").write_text("2", encoding="utf-8")
    inode = {name: str((out / name).stat().st_ino) for name in ("a", "b/c/d", "b/c", "b", ".", "..")}
    assert set(calls[:2]) == {inode["a"], inode["b/c/d"]}
    assert calls[2:] == [inode["b/c"], inode["b"], inode["."], "rename", inode[".."]]


def test_no_file_stays_open(out: Path) -> None:
    """None is open after a success that clears a leftover, or after a failure."""
    before = sorted(os.listdir("/dev/fd"))
    (out.parent / ".out.partial-0123456789abcdef").mkdir(parents=True)
    fill(out)
    with pytest.raises(RuntimeError):
        fail(out, RuntimeError(), force=True)
    assert sorted(os.listdir("/dev/fd")) == before
    assert left_in(out) == ["out"]


def inside_a_file(out: Path) -> Path:
    out.parent.mkdir(parents=True)
    (out.parent / "file").write_text("x", encoding="utf-8")
    return out.parent / "file" / "out"


@pytest.mark.parametrize(
    "place", [inside_a_file, lambda out: out.with_name("x" * 250), lambda out: out.with_name("a\0b")]
)
def test_places_where_nothing_can_be_made(place: Callable[[Path], Path], out: Path) -> None:
    """A parent that is a file, a name too long once it has its prefix, and a name that no system takes."""
    target = place(out)
    with pytest.raises(H1ExportError, match=r"cannot be made .*; choose another OUT"):
        fill(target)


LOOKALIKES = [lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to("/"), Path.touch]


@pytest.mark.parametrize("make", LOOKALIKES, ids=["dangling", "link", "file"])
def test_what_only_looks_like_a_leftover_is_left_alone(make: Callable[[Path], None], out: Path) -> None:
    out.parent.mkdir(parents=True)
    make(out.parent / ".out.partial-fedcba9876543210")
    fill(out)
    assert left_in(out) == [".out.partial-fedcba9876543210", "out"]


@pytest.mark.parametrize("make", LOOKALIKES, ids=["dangling", "link", "file"])
def test_what_only_looks_like_the_stage_is_refused(make: Callable[[Path], None], out: Path) -> None:
    out.parent.mkdir(parents=True)
    make(out.parent / f".out.partial-{KEY}")
    with pytest.raises(H1ExportError, match="cannot be made"):
        fill(out)
    assert left_in(out) == [f".out.partial-{KEY}"]


@pytest.mark.parametrize(
    "name", ["notes", ".out.partial-1", ".out.partial-FEDCBA9876543210", ".out2.partial-fedcba9876543210"]
)
def test_folders_of_other_names_are_left_alone(name: str, out: Path) -> None:
    (out.parent / name).mkdir(parents=True)
    fill(out)
    assert left_in(out) == sorted([name, "out"])


def test_another_users_stage_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's name can be predicted, and another user who owns the folder could change what a build writes."""
    (out.parent / f".out.partial-{KEY}").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(H1ExportError, match="belongs to another user"):
        fill(out)


def test_a_leftover_keeps_what_its_journal_names(out: Path) -> None:
    stage = out.parent / f".out.partial-{KEY}"
    (stage / "folder").mkdir(parents=True)
    for name in ("data", "other"):
        (stage / name).write_bytes(b"12345678")
    (stage / "link").symlink_to("data")
    extent = Extent("data", "a", 0, length=4)
    Journal(stage).add(extent, hashlib.sha256(b"1234").hexdigest())
    Journal(stage).add(Extent("link", "b", 0, length=4), "")
    with staged(out, force=False, key=KEY) as folder:
        assert folder == stage
        assert {path.name for path in folder.iterdir()} == {"data", JOURNAL}
        assert Journal(folder).holds(extent)
    assert [path.name for path in out.iterdir()] == ["data"]
    assert left_in(out) == ["out"]


def test_a_leftover_keeps_nested_files_that_its_journal_names(out: Path) -> None:
    """Other files, folders left empty, and links are removed; what a link leads to stays as it is."""
    stage = out.parent / f".out.partial-{KEY}"
    elsewhere = out.parent / "elsewhere"
    for name in (
        "deep/er/data",
        "deep/er/other",
        "deep/none/left/x",
        "deep/.journal",
        "data",
        "empty/too/../x",
        "named/as/file/x",
    ):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(b"12345678")
    (stage / "empty" / "too").mkdir(exist_ok=True)
    elsewhere.mkdir()
    (elsewhere / "data").write_bytes(b"theirs")
    (stage / "link").symlink_to(elsewhere)
    (stage / "deep" / "link").symlink_to(elsewhere / "data")
    extent = Extent("deep/er/data", "a", 0, length=4)
    Journal(stage).add(extent, hashlib.sha256(b"1234").hexdigest())
    for name in ("link/data", "deep/link", "../elsewhere/data", "named/as/file", str(elsewhere / "data")):
        Journal(stage).add(Extent(name, "b", 0, length=4), "")
    with staged(out, force=False, key=KEY) as folder:
        assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
            JOURNAL,
            "deep",
            "deep/er",
            "deep/er/data",
        ]
        assert Journal(folder).holds(extent)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == ["deep", "deep/er", "deep/er/data"]
    assert (elsewhere / "data").read_bytes() == b"theirs"
    assert left_in(out) == ["elsewhere", "out"]


def test_without_locks_there_is_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("portalocker.portalocker.LOCKER", no_locks)
    with pytest.raises(H1ExportError, match="Operation not supported"), staged(tmp_path / "out", force=False, key=KEY):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_only_looks_set_aside_is_left_alone(out: Path) -> None:
    theirs = out.with_name(f".{out.name}.aside")
    theirs.mkdir(parents=True)
    (theirs / "precious").write_text("theirs", encoding="utf-8")
    fill(out)
    fill(out, "newer", force=True)
    assert (theirs / "precious").read_text(encoding="utf-8") == "theirs"
