"""The library that counts and fails calls (csrc/faults.c), and the memory that controls it."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "csrc" / "faults.c"
VARIABLE = "H1EXPORT_FAULTS"
# struct control of faults.c
SETTINGS = struct.Struct("=iiiiqq")
COUNTS = struct.Struct("=qq")
PATH_BYTES = 1024
FOLDERS = 4
SIZE = SETTINGS.size + COUNTS.size + FOLDERS * PATH_BYTES

KINDS = {
    "open": 1,
    "write": 2,
    "truncate": 4,
    "mkdir": 8,
    "rename": 16,
    "link": 32,
    "sync": 64,
    "close": 128,
    "map": 256,
}
CHANGES = sum(KINDS.values()) - KINDS["close"]
ERROR, SHORT, KILL = range(3)
FOREVER = 1 << 62


@dataclass(frozen=True)
class Fault:
    """What happens to the calls from number ``first`` on.

    Attributes:
        first: number of the first call that fails; counted from 0.
        count: how many calls fail.
        error: the errno of a call that fails.
        action: ERROR; SHORT: the first of them, if it writes, writes a half; KILL: the process is killed before it.
        kinds: kinds of calls that are counted, as a sum of KINDS.
    """

    first: int = FOREVER
    count: int = 1
    error: int = 0
    action: int = ERROR
    kinds: int = CHANGES


@dataclass(frozen=True)
class Call:
    """A counted call: its number, its kind, and the path of the file."""

    number: int
    kind: str
    path: str


class Faults:
    """The control of the library in this process and its children."""

    def __init__(self, place: Path) -> None:
        """Map the file ``place``, which ``started_with`` has made."""
        with place.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), SIZE)
        self._log = Path(f"{place}.log")

    def arm(self, fault: Fault, *folders: Path) -> None:
        """Count the calls below ``folders`` from now on, and fail those of ``fault``."""
        self.disarm()
        self._log.unlink(missing_ok=True)
        COUNTS.pack_into(self._memory, SETTINGS.size, 0, 0)
        for index in range(FOLDERS):
            name = os.fsencode(folders[index].resolve()) if index < len(folders) else b""
            start = SETTINGS.size + COUNTS.size + index * PATH_BYTES
            self._memory[start : start + PATH_BYTES] = name.ljust(PATH_BYTES, b"\0")
        last = min(fault.first + fault.count, FOREVER)
        SETTINGS.pack_into(self._memory, 0, 1, fault.kinds, fault.action, fault.error, fault.first, last)

    def disarm(self) -> None:
        """Let every call through, uncounted."""
        SETTINGS.pack_into(self._memory, 0, 0, 0, 0, 0, FOREVER, FOREVER)

    @property
    def failed(self) -> int:
        """How many calls have failed since ``arm``."""
        return int(COUNTS.unpack_from(self._memory, SETTINGS.size)[1])

    def calls(self) -> list[Call]:
        """Return the calls that were counted since ``arm``, in their order."""
        if not self._log.exists():
            return []
        lines = [line.split(" ", 2) for line in self._log.read_text("utf-8", "surrogateescape").splitlines()]
        return sorted((Call(int(number), kind, path) for number, kind, path in lines), key=lambda call: call.number)


def compiled(folder: Path) -> Path:
    """Compile the library into ``folder`` with the system's C compiler."""
    made = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(made), "-ldl"]
    subprocess.run(command, check=True)
    return made


def environment(folder: Path, made: Path) -> dict[str, str]:
    """Return the variables with which a process loads the library ``made``; its control is made in ``folder``."""
    place = folder / "control"
    place.write_bytes(bytes(SIZE))
    return {"LD_PRELOAD": str(made), VARIABLE: str(place)}


def control() -> Faults:
    """Return the control of the library that this process was started with."""
    return Faults(Path(os.environ[VARIABLE]))


def kinds_of(calls: list[Call]) -> str:
    """Return how many calls there are of each kind, as text."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(call.kind for call in calls).items()))


def started_with(module: str, words: list[str], folder: Path) -> int:
    """Run a module of Python in a process that has loaded the library, and return its exit code."""
    variables = (
        os.environ | environment(folder, compiled(folder)) | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    )
    return subprocess.run([sys.executable, "-m", module, *words], env=variables).returncode
