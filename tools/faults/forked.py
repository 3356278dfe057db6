"""The command line in a fork of this process: what it imports is paid for once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from h1export.errors import H1ExportError

MOST_LINE = 300  # characters of an error beside the path of the file at fault
TIMEOUT = 60.0  # seconds


Work = Callable[[], int]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, or the negative number of the signal that ended it.
        error: what it wrote to standard error.
        seconds: how long it ran.
    """

    code: int
    error: str
    seconds: float

    def wrong_line(self) -> str:
        """Return what is wrong with the line of an error that ended it, or an empty text."""
        lines = self.error.splitlines()
        if len(lines) != 1 or not lines[0].startswith("h1export: "):
            return f"not one line: {self.error[-2000:]!r}"
        path = next((word for word in lines[0].split(": ") if word.startswith("/")), "")
        if len(lines[0]) - len(path) > MOST_LINE + len("h1export: "):
            return f"{len(lines[0])} characters"
        if "internal error" in lines[0]:
            return lines[0]
        return ""


class Process:
    """A fork of this process that does some work."""

    def __init__(self, work: Work, scratch: Path, name: str = "error", *, stdin: str = "", start: float = 0.0) -> None:
        """Start it, ``start`` seconds from now; ``scratch`` is a folder for its messages, ``name`` a file there.

        ``work`` returns its exit code, and may raise H1ExportError.
        """
        self._error = scratch / name
        typed = scratch / f"{name}.stdin"
        typed.write_text(stdin, "utf-8")
        self._begun = time.monotonic()
        self.number = os.fork()
        if self.number == 0:
            _be_child(lambda: _late(work, start), typed, self._error)

    def wait(self) -> Ended:
        """Wait for its end, and return how it ended; a process that takes longer than TIMEOUT is killed."""
        while True:
            found, status = os.waitpid(self.number, os.WNOHANG)
            if found:
                break
            if time.monotonic() - self._begun > TIMEOUT:
                os.kill(self.number, signal.SIGKILL)
            time.sleep(0.002)
        seconds = time.monotonic() - self._begun
        return Ended(os.waitstatus_to_exitcode(status), self._error.read_text("utf-8", "replace"), seconds)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        os.kill(self.number, signal.SIGKILL)


def command(words: Sequence[str]) -> Work:
    """Return the work of the command line with ``words``."""

    def work() -> int:
        from h1export.cli import run

        return run(list(words))

    return work


def ran(words: Sequence[str], scratch: Path) -> Ended:
    """Run the command line with ``words`` in a fork, and return how it ended."""
    return Process(command(words), scratch).wait()


def _late(work: Work, start: float) -> int:
    time.sleep(start)
    try:
        return work()
    except H1ExportError as error:
        sys.stderr.write(f"h1export: {error}\n")
        return 2


def _be_child(work: Work, stdin: Path, error: Path) -> None:
    """Run ``work`` and end this process, which is a fork, with its result."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        handle = os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        code = work()
        sys.stderr.flush()
    finally:
        os._exit(code)
