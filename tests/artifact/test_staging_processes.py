"""staged() among processes: builders that are killed, and several builders at one OUT."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from h1export.artifact.files import names
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.staging import staged
from h1export.errors import H1ExportError

KEY = "0123456789abcdef"
OTHER_KEY = "fedcba9876543210"

BUILDER = """
import sys
from pathlib import Path
from h1export.artifact.staging import staged
with staged(Path(sys.argv[1]), force=sys.argv[2] == "force", key=sys.argv[3]) as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    sys.stdin.readline()
"""

# Builds with --force and kills itself right after the first change that anybody can see at OUT.
DIES_AT_THE_RENAME = """
import ctypes, os, sys
from pathlib import Path
from h1export.artifact.staging import staged
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

# Writes the tensors of a nested file, one by one and journalled, and kills itself before the one whose number it is
# given.
DIES_BEFORE_A_TENSOR = """
import hashlib, os, sys
from pathlib import Path
from h1export.artifact.journal import Extent, Journal
from h1export.artifact.staging import staged
out, last, name = Path(sys.argv[1]), int(sys.argv[2]), "package/Data/weight.bin"
with staged(out, force=False, key="0123456789abcdef") as folder:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "package" / "unnamed").write_text("written again")
    journal = Journal(folder)
    with open(os.open(folder / name, os.O_CREAT | os.O_RDWR), "r+b") as stream:
        for tensor in range(8):
            extent, data = Extent(name, str(tensor), 100 * tensor, 100), bytes([tensor]) * 100
            if tensor == last:
                os.kill(os.getpid(), 9)
            if journal.holds(extent):
                continue
            print(tensor, flush=True)
            stream.seek(extent.offset)
            stream.write(data)
            stream.flush()
            journal.add(extent, hashlib.sha256(data).hexdigest())
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fill(out: Path, target: str = "new", force: bool = False) -> None:
    """Build a folder with as much of a manifest as tells an artifact from other folders."""
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
    """Of two different builds at one OUT the second finishes; the first finds OUT taken and leaves nothing."""
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
    """The second build fails at once; the first finishes."""
    with builder(out) as (process, stage):
        with pytest.raises(H1ExportError, match=r"out: another process builds the same artifact there; wait for it"):
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
    """OUT is the complete new artifact; the next build removes the old one."""
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


def test_a_killed_build_goes_on_in_a_nested_file(out: Path) -> None:
    """Each tensor is written once, by any of the builds; nothing of the stage is left beside the artifact."""
    written = []
    for last in (3, 3, 4, 7, 8):
        run = subprocess.run(
            [sys.executable, "-c", DIES_BEFORE_A_TENSOR, str(out), str(last)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert run.returncode == (-signal.SIGKILL if last < 8 else 0)
        assert out.exists() == (last == 8)
        written.append(run.stdout.split())
    assert written == [["0", "1", "2"], [], ["3"], ["4", "5", "6"], ["7"]]
    assert (out / "package" / "Data" / "weight.bin").read_bytes() == b"".join(
        bytes([tensor]) * 100 for tensor in range(8)
    )
    assert names(out) == ["package/Data/weight.bin", "package/unnamed"]
    assert left_in(out) == ["out"]
