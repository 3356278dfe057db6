"""Running an artifact needs nothing that only Linux or POSIX has: its modules, /proc and affinity are hidden here.

Neither Windows nor macOS has run h1export; these tests show only what the code asks of the system.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.artifact.artifact import Artifact

# Hides the modules from every import by our own files, because the libraries below us ask for them where they exist.
HIDE = """
import builtins, os, pathlib, sys

POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"}
plain = builtins.__import__

def ours(variables):
    return (variables or {}).get("__name__", "").split(".")[0] in ("h1export", "__main__", "portalocker", "psutil")

def hidden(name, variables=None, *rest, **named):
    if name.split(".")[0] in POSIX and (variables or {}).get("__name__", "").split(".")[0] == "h1export":
        raise ModuleNotFoundError(f"No module named {name!r} on this system", name=name)
    return plain(name, variables, *rest, **named)

def refuse(path):
    if str(path).startswith("/proc") and ours(sys._getframe(2).f_globals):
        raise FileNotFoundError(path)

opened = builtins.open
def open_(path, *rest, **named):
    refuse(path)
    return opened(path, *rest, **named)

builtins.__import__ = hidden
builtins.open = open_
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, *rest, **named: not str(self).startswith("/proc") and exists(self, *rest, **named)
for name in ("sched_getaffinity", "sched_setaffinity", "geteuid", "getuid", "fork"):
    if hasattr(os, name):
        delattr(os, name)
import psutil
del psutil.Process.cpu_affinity
from h1export.cli import run
sys.exit(run(sys.argv[1:]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE, *words], capture_output=True, text=True, timeout=120)


def test_the_hiding_hides() -> None:
    """A module of ours that asks for fcntl fails under it, so the tests below can fail."""
    probe = HIDE.replace("from h1export.cli import run", "exec('import fcntl', {'__name__': 'h1export.x'})")
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "No module named 'fcntl' on this system" in found.stderr


@pytest.mark.parametrize("words", [("--help",), ("build", "--help"), ("generate", "--help")])
def test_help_needs_nothing_of_posix(words: tuple[str, ...]) -> None:
    found = run(*words)
    assert found.returncode == 0, found.stderr
    assert "Usage" in found.stdout


@pytest.mark.ort
def test_an_artifact_is_inspected_and_generates(tiny: Path, build: Callable[..., Artifact]) -> None:
    folder = str(build(tiny, "int8").folder)
    found = run("inspect", folder)
    assert found.returncode == 0, found.stderr
    found = run("generate", folder, "The", "--max-tokens", "3", "--kernels", "stock")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()
