"""tools/faults on what writes without a model: no call of the system may fail unnoticed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import library
from faults.library import CHANGES, FOREVER, KINDS, Fault

TOOLS = Path(library.__file__).parents[1]
WITHOUT_ATOMICITY = """
import sys
from pathlib import Path
from faults import library
from faults.cases import Case
from faults.primitives import no_words, written
from faults.writes import Room, run
def careless(place):
    (place / "a").write_text("new")
    return 0
scratch = Path(sys.argv[1])
(scratch / "tmp").mkdir()
print(run(Case("careless", no_words, written, does=careless), Room(scratch), library.control(), most=10).faults)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled."""
    return library.compiled(tmp_path_factory.mktemp("library"))


@pytest.fixture
def variables(made: Path, tmp_path: Path) -> dict[str, str]:
    """The variables of a process that loads the library."""
    (tmp_path / "control").mkdir()
    loading = library.environment(tmp_path / "control", made)
    return os.environ | loading | {"PYTHONPATH": str(TOOLS), "OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="a library for Linux's loader, which needs cc"
)


def test_every_write_of_the_writers_fails_in_one_line_and_leaves_what_was_there() -> None:
    """Every call of a staged build, a file, a saved chat and the cache; and kills before calls of a staged build."""
    words = [sys.executable, "-m", "faults.run", "--targets", "", "--most", "4"]
    ran = subprocess.run(words, cwd=TOOLS, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(", 0 faults") + ran.stdout.count("; 0 faults") == 8, ran.stdout
    assert ran.stdout.endswith("\n0 faults\n")


def test_a_careless_writer_is_seen(variables: dict[str, str], tmp_path: Path) -> None:
    """The check itself: a file that is written in place loses what it had."""
    words = [sys.executable, "-c", WITHOUT_ATOMICITY, str(tmp_path)]
    ran = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    assert "full from write 1 (a)" in ran.stdout
    assert "*place/a" in ran.stdout


CALLS = {
    "open": ("os.open(place + '/new', os.O_CREAT | os.O_WRONLY)", "open"),
    "write": ("os.write(handle, b'12345678')", "write"),
    "pwrite": ("os.pwrite(handle, b'12345678', 4)", "write"),
    "writev": ("os.writev(handle, [b'1234', b'5678'])", "write"),
    "buffered": ("__import__('pathlib').Path('b').write_bytes(b'12345678')", "write"),
    "truncate": ("os.ftruncate(handle, 100)", "truncate"),
    "by name": ("os.truncate(place + '/a', 100)", "truncate"),
    "allocate": ("os.posix_fallocate(handle, 0, 100)", "fallocate"),
    "copy": ("__import__('shutil').copyfile(place + '/a', place + '/copy')", "sendfile"),
    "mkdir": ("os.mkdir('folder')", "mkdir"),
    "rename": ("os.rename('a', 'other')", "rename"),
    "replace": ("os.replace('a', 'other')", "rename"),
    "link": ("os.link('a', 'other')", "link"),
    "symlink": ("os.symlink('a', 'other')", "link"),
    "sync": ("os.fsync(handle)", "sync"),
    "close": ("os.close(handle)", "close"),
    "map": ("__import__('mmap').mmap(handle, 8)", "map"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_counted_and_fails(name: str, variables: dict[str, str], tmp_path: Path) -> None:
    """A call that the library does not see would make every other check worthless."""
    call, kind = CALLS[name]
    place = tmp_path / "place"
    place.mkdir()
    control = library.Faults(Path(variables[library.VARIABLE]))
    text = f"import os\nplace = {str(place)!r}\nhandle = os.open('a', os.O_RDWR)\n{call}\n"
    everything = CHANGES + KINDS["close"]

    def run(fault: Fault) -> subprocess.CompletedProcess[str]:
        (place / "a").write_bytes(b"87654321")
        control.arm(fault, place)
        words = [sys.executable, "-I", "-S", "-c", text]
        ran = subprocess.run(words, cwd=place, env=variables, capture_output=True, text=True, check=False)
        control.disarm()
        return ran

    assert run(Fault(kinds=everything)).returncode == 0
    counted = next(found for found in control.calls()[1:] if found.kind == kind)
    for left in place.iterdir():
        left.rmdir() if left.is_dir() else left.unlink()
    failed = run(Fault(counted.number, FOREVER, errno.EDQUOT, kinds=everything))
    assert "Disk quota exceeded" in failed.stderr
    assert control.failed >= 1
