"""Compiled code is loaded only where nobody else can have written it, and heals where it is damaged."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from h1export.errors import H1ExportError
from h1export.runtime import code_cache
from h1export.runtime.code_cache import DIGEST_SUFFIX, CacheRefusedError, cached, is_whole

NAME = "lib.so"
KEY = "0123"
GOOD = b"compiled here"
EVIL = b"somebody else's"
STRANGER = 12345


class Compiler:
    """Writes GOOD, and counts."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, folder: Path) -> Path:
        assert list(folder.iterdir()) == []
        self.runs += 1
        made = folder / "made.so"
        made.write_bytes(GOOD)
        return made


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the caches, which does not exist yet, in one of its own."""
    folder = tmp_path / "above" / "cache"
    folder.parent.mkdir()
    folder.parent.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def get(compiler: Compiler) -> Path:
    return cached("kind", KEY, NAME, make=compiler)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``path`` a stranger's; who is not root cannot, and is told so by lstat."""
    if os.geteuid() == 0:
        return os.chown(path, STRANGER, STRANGER)
    real = Path.lstat

    def lstat(asked: Path) -> os.stat_result:
        found = real(asked)
        mine = [*found]
        mine[4] = STRANGER  # st_uid
        return os.stat_result(mine) if found.st_ino == inode else found

    inode = path.lstat().st_ino
    monkeypatch.setattr(Path, "lstat", lstat)
    return None


def plant(library: Path) -> None:
    """Put other code there with a SHA-256 that agrees with it."""
    library.write_bytes(EVIL)
    (library.parent / (NAME + DIGEST_SUFFIX)).write_text(f"{hashlib.sha256(EVIL).hexdigest()}  {NAME}\n")


def test_it_is_made_once_and_noted(home: Path, compiler: Compiler) -> None:
    first = get(compiler)
    assert first == get(compiler) == home / "h1export" / "kind" / KEY / NAME
    assert compiler.runs == 1
    note = first.parent / (NAME + DIGEST_SUFFIX)
    assert note.read_text() == f"{hashlib.sha256(GOOD).hexdigest()}  {NAME}\n"
    assert {path.name for path in first.parent.parent.iterdir()} == {KEY}


def replace_by_link(path: Path) -> None:
    moved = path.with_name(path.name + ".moved")
    path.rename(moved)
    path.symlink_to(moved)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_file(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.write_bytes(EVIL)


# what happens to a library, its note or their folder: the library is not loaded, and heals
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda library, _: os.truncate(library, 3),
    "emptied": lambda library, _: os.truncate(library, 0),
    "a byte changed": lambda library, _: library.write_bytes(b"C" + GOOD[1:]),
    "longer": lambda library, _: library.write_bytes(GOOD + b"\0"),
    "removed": lambda library, _: library.unlink(),
    "a folder": lambda library, _: replace_by_folder(library),
    "a link": lambda library, _: replace_by_link(library),
    "a link to nothing": lambda library, _: replace_by_link_to_nothing(library),
    "note removed": lambda _, note: note.unlink(),
    "note emptied": lambda _, note: os.truncate(note, 0),
    "note cut": lambda _, note: os.truncate(note, 20),
    "note of other code": lambda _, note: note.write_text(f"{hashlib.sha256(EVIL).hexdigest()}  {NAME}\n"),
    "note in no text": lambda _, note: note.write_bytes(b"\xff\xfe"),
    "note a link": lambda _, note: replace_by_link(note),
    "the entry a link": lambda library, _: replace_by_link(library.parent),
    "the entry a file": lambda library, _: replace_by_file(library.parent),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_code_heals(damage: str, home: Path, compiler: Compiler) -> None:
    library = get(compiler)
    DAMAGES[damage](library, library.parent / (NAME + DIGEST_SUFFIX))
    assert not is_whole(library.parent, NAME)
    assert get(compiler) == library
    assert compiler.runs == 2
    assert library.read_bytes() == GOOD
    assert not library.is_symlink()
    assert is_whole(library.parent, NAME)
    assert get(compiler) == library
    assert compiler.runs == 2


@pytest.mark.parametrize("mode", [0o660, 0o602, 0o666, 0o777])
@pytest.mark.parametrize("place", ["library", "note", "entry"])
def test_what_others_could_write_is_compiled_again(place: str, mode: int, home: Path, compiler: Compiler) -> None:
    library = get(compiler)
    plant(library)
    {"library": library, "note": library.parent / (NAME + DIGEST_SUFFIX), "entry": library.parent}[place].chmod(mode)
    assert get(compiler).read_bytes() == GOOD
    assert stat.S_IMODE(library.stat().st_mode) == 0o600
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("place", ["library", "note", "entry"])
def test_what_belongs_to_another_user_is_compiled_again(
    place: str, home: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = get(compiler)
    plant(library)
    path = {"library": library, "note": library.parent / (NAME + DIGEST_SUFFIX), "entry": library.parent}[place]
    give_away(path, monkeypatch)
    assert get(compiler).read_bytes() == GOOD
    assert library.lstat().st_uid == os.geteuid()


def folders(home: Path) -> dict[str, Path]:
    """Each folder above an entry, from the fixture's own on."""
    project = home / "h1export"
    return {"above": home.parent, "cache": home, "h1export": project, "kind": project / "kind"}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720])
@pytest.mark.parametrize("place", ["above", "cache", "h1export", "kind"])
def test_a_folder_that_others_can_write_is_refused(place: str, mode: int, home: Path, compiler: Compiler) -> None:
    plant(get(compiler))
    folder = folders(home)[place]
    folder.chmod(mode)
    with pytest.raises(
        CacheRefusedError, match=rf"{folder}: .*other users can write it, mode {mode:o}.*XDG_CACHE_HOME"
    ):
        get(compiler)
    assert compiler.runs == 1


@pytest.mark.parametrize("place", ["h1export", "kind"])
def test_a_sticky_bit_does_not_make_our_own_folder_private(place: str, home: Path, compiler: Compiler) -> None:
    plant(get(compiler))
    folders(home)[place].chmod(0o1777)
    with pytest.raises(CacheRefusedError, match="mode 1777"):
        get(compiler)


def test_a_folder_like_tmp_may_lie_above(home: Path, compiler: Compiler) -> None:
    home.parent.chmod(0o1777)
    assert get(compiler).read_bytes() == GOOD


@pytest.mark.parametrize("place", ["above", "cache", "h1export", "kind"])
def test_a_folder_of_another_user_is_refused(
    place: str, home: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(get(compiler))
    give_away(folders(home)[place], monkeypatch)
    with pytest.raises(CacheRefusedError, match=f"belongs to user {STRANGER}"):
        get(compiler)


@pytest.mark.parametrize("place", ["above", "cache", "h1export", "kind"])
def test_a_linked_folder_is_refused(place: str, home: Path, compiler: Compiler) -> None:
    plant(get(compiler))
    replace_by_link(folders(home)[place])
    with pytest.raises(CacheRefusedError, match="it is a link"):
        get(compiler)
    assert compiler.runs == 1


@pytest.mark.parametrize("place", ["cache", "h1export", "kind"])
def test_a_file_in_place_of_a_folder_is_refused(place: str, home: Path, compiler: Compiler) -> None:
    folder = folders(home)[place]
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.write_bytes(b"")
    with pytest.raises(CacheRefusedError, match="it is no folder"):
        get(compiler)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077, 0o777], ids=oct, indirect=True)
def test_folders_are_private_whatever_the_umask(home: Path, compiler: Compiler, umask: None) -> None:
    library = get(compiler)
    for folder in (home, *home.rglob("*")):
        assert stat.S_IMODE(folder.stat().st_mode) == (0o700 if folder.is_dir() else 0o600), folder
    assert get(compiler) == library
    assert compiler.runs == 1


@pytest.mark.parametrize("named", ["", "relative", "./cache", "~/cache"])
def test_a_cache_home_that_is_not_absolute_is_ignored(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert get(compiler).is_relative_to(tmp_path / "user" / ".cache")
    assert [path.name for path in tmp_path.iterdir()] == ["user"]


@pytest.mark.parametrize("named", [None, "", "relative"])
def test_without_a_home_the_user_database_has_one(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("HOME", named)

    class User:
        pw_dir = str(tmp_path)

    monkeypatch.setattr("pwd.getpwuid", lambda _: User)
    assert get(compiler).is_relative_to(tmp_path / ".cache")

    def missing(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", missing)
    with pytest.raises(CacheRefusedError, match="names no home folder"):
        get(compiler)


def test_a_folder_that_cannot_be_written_is_named(
    home: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CacheRefusedError, match=rf"{home}: .*Read-only file system.*XDG_CACHE_HOME"):
        get(compiler)


def test_a_compiler_that_fails_leaves_nothing(home: Path) -> None:
    def failing(folder: Path) -> Path:
        (folder / "half").write_bytes(b"")
        raise H1ExportError("c++", "does not compile", "mend it")

    with pytest.raises(H1ExportError, match="does not compile"):
        cached("kind", KEY, NAME, make=failing)
    assert list((home / "h1export" / "kind").iterdir()) == []


def test_processes_that_heal_one_entry_at_once_agree(home: Path, compiler: Compiler) -> None:
    library = get(compiler)
    library.write_bytes(EVIL)
    program = (
        "import pathlib\n"
        "from h1export.runtime.code_cache import cached\n"
        "def make(folder):\n"
        "    (folder / 'made').write_bytes(b'compiled here')\n"
        "    return folder / 'made'\n"
        f"print(cached('kind', '{KEY}', '{NAME}', make=make).read_text())\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate()[0] for process in running] == [GOOD + b"\n"] * 4
    assert [path.name for path in library.parent.parent.iterdir()] == [KEY]


DIES = """
import os, pathlib, signal
from h1export.runtime.code_cache import cached
def make(folder):
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
cached("kind", "0123", "lib.so", make=make)
"""


def test_what_a_killed_process_left_is_removed(home: Path, compiler: Compiler) -> None:
    subprocess.run([sys.executable, "-c", DIES], check=False)
    kind = home / "h1export" / "kind"
    (left,) = kind.iterdir()
    assert list(left.rglob("half"))
    library = get(compiler)
    assert library.read_bytes() == GOOD
    assert [path.name for path in kind.iterdir()] == [KEY]


def test_what_a_running_process_makes_is_left_alone(home: Path, compiler: Compiler) -> None:
    def slow(folder: Path) -> Path:
        cached("kind", "other", NAME, make=compiler)
        return compiler(folder)

    assert cached("kind", KEY, NAME, make=slow).read_bytes() == GOOD
    assert sorted(path.name for path in (home / "h1export" / "kind").iterdir()) == [KEY, "other"]


def test_a_file_system_without_locks_compiles_too(
    home: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise code_cache.portalocker.LockException("no locks")

    (home / "h1export" / "kind" / ".work-left").mkdir(parents=True, mode=0o700)
    for folder in (home, home / "h1export", home / "h1export" / "kind"):
        folder.chmod(0o700)
    monkeypatch.setattr(code_cache.portalocker, "lock", none)
    assert get(compiler).read_bytes() == GOOD
    assert sorted(path.name for path in (home / "h1export" / "kind").iterdir()) == [".work-left", KEY]
