"""Run compilers, and find in what they print the line that says what is wrong."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

UMASK = 0o077  # whatever this process has: one that takes the owner's bits away would keep compilers from their files
FOLDER = re.compile(r"^[^\s:]*/(?=[^/\s:]+:)")  # of the file that a diagnostic begins with
# the first kind of line that there is, counts: compilers' diagnostics, then those of CMake and make
ERRORS = (re.compile(r"\berror: "), re.compile(r"error", re.IGNORECASE))


class CompilerFailedError(Exception):
    """A compiler ended with another exit code than 0; ``code`` is that, and ``message`` its first error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"exit code {code}: {message}")
        self.code = code
        self.message = message


def run_compiler(command: Sequence[str]) -> bytes:
    """Run a compiler without standard input, and return what it wrote to standard output.

    Raises:
        CompilerFailedError: it failed.
        OSError: it cannot be run.
    """
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, umask=UMASK)
    if done.returncode != 0:
        output = (done.stderr + b"\n" + done.stdout).decode(errors="replace")
        raise CompilerFailedError(done.returncode, first_error(output))
    return done.stdout


def first_error(output: str) -> str:
    """Return the first line of ``output`` that is an error, or its last line, without the folder of the file named.

    Later errors often follow from the first, and the build tool's own come last.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = next((line for kind in ERRORS for line in lines if kind.search(line)), lines[-1] if lines else "")
    return FOLDER.sub("", found)
