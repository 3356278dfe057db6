"""staged() among processes: builders that are killed, and builders at one place at one time."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from h1export.core.artifact import MANIFEST
from h1export.core.stage import staged
from h1export.errors import H1ExportError

KEY, OTHER_KEY = "0123456789abcdef", "fedcba9876543210"

BUILDER = """
import sys
from pathlib import Path
from h1export.core.stage import staged
with staged(Path(sys.argv[1]), force=sys.argv[2] == "force", key=sys.argv[3]) as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    sys.stdin.readline()
"""

# Builds with --force and kills itself right after the first change that anybody can see at OUT.
DIES_AT_THE_RENAME = """
import ctypes, os, sys
from pathlib import Path
from h1export.core.stage import staged
out, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
fsync, rename = os.fsync, Path.rename
def fsync_or_die(handle):
    if os.fstat(handle).st_ino == out.parent.stat().st_ino:
        os.kill(os.getpid(), 9)
    fsync(handle)
def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), 9)
os.fsync = fsync_or_die
if not exchange:
    ctypes.CDLL = lambda *_, **__: object()
    Path.rename = rename_and_die
with staged(out, force=True, key="0123456789abcdef") as folder:
    (folder / "manifest.json").write_text('{"format": 1, "target": "killed", "files": {}}')
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fill(out: Path, target: str = "new", force: bool = False) -> None:
    """A build of as much of a manifest as tells an artifact from other folders."""
    with staged(out, force, KEY) as folder:
        (folder / MANIFEST).write_text(json.dumps({"format": 1, "target": target, "files": {}}), encoding="utf-8")


def left_in(out: Path) -> list[str]:
    """Names beside and including ``out``, hidden ones too."""
    return sorted(path.name for path in out.parent.iterdir())


def content(out: Path) -> str:
    return str(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["target"])


@contextlib.contextmanager
def builder(out: Path, force: str = "", key: str = KEY) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in the middle of a build at ``out``, and its stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(out), force, key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("key", [KEY, OTHER_KEY], ids=["same", "other"])
@pytest.mark.parametrize("force", ["", "force"])
def test_a_killed_builder(force: str, key: str, out: Path) -> None:
    """Nothing appears at OUT (or the old artifact stays); the next build clears what is left and succeeds."""
    if force:
        fill(out, "old")
    with builder(out, force, key) as (process, stage):
        assert (stage / "half").is_file()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert out.exists() == bool(force)
    assert not force or content(out) == "old"
    assert stage.name in left_in(out)
    fill(out, force=bool(force))
    assert content(out) == "new"
    assert left_in(out) == ["out"]


def test_a_live_builders_stage_is_left_alone(out: Path) -> None:
    """Two builds of different things at one place: the second finishes, the first finds the place taken and leaves nothing."""
    with builder(out, key=OTHER_KEY) as (process, stage):
        fill(out, "second")
        assert (stage / "half").is_file()
        _, errors = process.communicate("go on\n")
        assert process.returncode == 1
        assert "H1ExportError" in errors
        assert "exists" in errors
    assert content(out) == "second"
    assert left_in(out) == ["out"]


def test_a_live_builder_that_may_replace_comes_last(out: Path) -> None:
    with builder(out, "force", OTHER_KEY) as (process, _):
        fill(out, "second")
        process.communicate("go on\n")
        assert process.returncode == 0
    assert (out / "half").is_file()
    assert left_in(out) == ["out"]


def test_one_thing_is_built_by_one_process(out: Path) -> None:
    """The second is told so at once; the first finishes."""
    with builder(out) as (process, stage):
        with pytest.raises(H1ExportError, match=r"out: another process builds the same thing there; wait for it"):
            fill(out)
        assert (stage / "half").is_file()
        process.communicate("go on\n")
        assert process.returncode == 0
    assert left_in(out) == ["out"]


def test_stages_of_other_places_are_left_alone(out: Path) -> None:
    with builder(out.parent / "out2") as (process, stage):
        process.kill()
        process.wait()
    fill(out)
    assert stage.is_dir()


def test_leftovers_of_a_name_with_brackets_are_found(out: Path) -> None:
    out = out.with_name("out[1]")
    with builder(out) as (process, _):
        process.kill()
        process.wait()
    fill(out)
    assert left_in(out) == ["out[1]"]


def killed_at_the_rename(out: Path, way: str) -> None:
    fill(out, "old")
    killed = subprocess.run([sys.executable, "-c", DIES_AT_THE_RENAME, str(out), way], check=False)
    assert killed.returncode == -signal.SIGKILL


def test_a_builder_killed_as_it_replaces_an_artifact(out: Path) -> None:
    """OUT is the new artifact, whole; the old one is what the next build clears."""
    killed_at_the_rename(out, "exchange")
    assert content(out) == "killed"
    assert len(left_in(out)) == 2
    fill(out, force=True)
    assert content(out) == "new"
    assert left_in(out) == ["out"]


def test_a_builder_killed_between_renames_where_nothing_can_be_swapped(out: Path) -> None:
    """OUT may be missing then; the next build leaves nothing hidden."""
    killed_at_the_rename(out, "rename")
    fill(out, force=True)
    assert content(out) == "new"
    assert left_in(out) == ["out"]
