"""Files that appear complete or not at all: full disks, kills, links, pipes and leftovers of other processes."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from h1export.errors import H1ExportError
from h1export.writing import replacing, write_file, write_into

LEFT = ".a.0123456789abcdef.partial"
HOLDER = """
import sys
from pathlib import Path
from h1export.writing import replacing
with replacing(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    print(stream.name, flush=True)
    sys.stdin.readline()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_into_a_folder_replaces_a_link_and_never_follows_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for place in ("report.json", "broken.json"):
        (tmp_path / "out" / place).symlink_to(victim if place == "report.json" else tmp_path / "nowhere")
        write_into(tmp_path / "out", place, b"new")
        assert (tmp_path / "out" / place).read_bytes() == b"new"
        assert not (tmp_path / "out" / place).is_symlink()
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["broken.json", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(H1ExportError, match=r"a: cannot be written \(No space left on device\)"):
        write_into(tmp_path, "a", b"new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


WRITERS = {"into a folder": lambda path, data: write_into(path.parent, path.name, data), "named": write_file}
FULL = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EROFS: "another place"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [*FULL, errno.EIO], ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("writer", WRITERS)
def test_any_failure_leaves_the_old_file_and_says_what_to_do(
    writer: str, number: int, tmp_path: Path, *, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(H1ExportError, match=re.escape(os.strerror(number))) as caught:
        WRITERS[writer](tmp_path / "a", b"new")
    assert FULL.get(number, "another place") in caught.value.next_step
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["missing/a", "a/b", "nul\0", "x" * 300, "."])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_takes_no_file_is_one_line(writer: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(H1ExportError, match="cannot be written"):
        WRITERS[writer](tmp_path / name, b"new")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a[1].*", "-", " "])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_name_of_a_file_is_taken(writer: str, name: str, tmp_path: Path) -> None:
    """A long name has no room for a suffix, and no character of one may mean anything in the search for leftovers."""
    for data in (b"1", b"2"):
        WRITERS[writer](tmp_path / name, data)
        assert (tmp_path / name).read_bytes() == data
    assert names(tmp_path) == [name]


def test_a_named_file_keeps_its_link_and_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to("real/a")
    (tmp_path / "dangling").symlink_to("real/b")
    write_file(tmp_path / "link", b"new")
    write_file(tmp_path / "dangling", b"new")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == (tmp_path / "real" / "b").read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(tmp_path / "real") == ["a", "b"]


def test_a_strangers_permissions_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o666)
    write_into(tmp_path, "a", b"new")
    assert not (tmp_path / "a").stat().st_mode & stat.S_IWOTH


def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, b"new")
    reader.join(10)
    assert read == [b"new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to(os.devnull)
    write_file(tmp_path / "null", b"new")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    assert names(tmp_path) == ["null", "pipe"]


def test_a_file_in_a_folder_that_takes_no_other_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a file that a container has mounted alone: it is there, and nothing can be renamed to it."""
    (tmp_path / "a").write_text("old")

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    with pytest.raises(H1ExportError, match="cannot be written"):
        write_file(tmp_path / "b", b"new")
    assert names(tmp_path) == ["a"]


def test_a_leftover_is_removed_and_what_is_none_stays(tmp_path: Path) -> None:
    (tmp_path / LEFT).write_text("half")
    other = [".a.0123.partial", ".ab.0123456789abcdef.partial", ".a.0123456789abcdeg.partial"]
    for name in other:
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".a.1111111111111111.partial").symlink_to(other[0])
    (tmp_path / ".a.2222222222222222.partial").mkdir()
    kept = [*other, ".a.1111111111111111.partial", ".a.2222222222222222.partial"]
    write_into(tmp_path, "a", b"new")
    assert names(tmp_path) == sorted([*kept, "a"])


def test_a_running_writer_is_left_alone_and_a_killed_one_is_cleared(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        beside = Path(process.stdout.readline().strip())
        write_into(tmp_path, "a", b"ours")
        assert names(tmp_path) == sorted([beside.name, "a"])
        process.send_signal(signal.SIGKILL)
    assert beside.read_bytes() == b"half"
    write_into(tmp_path, "a", b"ours again")
    assert names(tmp_path) == ["a"]


def test_two_writers_end_with_the_whole_file_of_one(tmp_path: Path) -> None:
    """Eight threads write the same name again and again: nobody's file is taken for a leftover."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(25):
                write_into(tmp_path, "a", bytes([number]) * 4096)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    data = (tmp_path / "a").read_bytes()
    assert len(data) == 4096
    assert len(set(data)) == 1
    assert names(tmp_path) == ["a"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing(tmp_path / "a") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []
