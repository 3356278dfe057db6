"""Our own CPU kernels behind ONNX Runtime's custom-op interface, compiled for this machine at their first use.

csrc/library.cc lists the ops; each is one file beside it. An artifact that uses them also has a graph without them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from h1export.errors import H1ExportError

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted((FOLDER / "csrc").glob("*.cc")))
HEADERS = tuple(sorted([*(FOLDER / "csrc").glob("*.h"), *(FOLDER / "include").glob("*.h")]))
NAME = "libh1export_ort.so"
COMPILERS = ("c++", "g++", "clang++")  # in this order, where $CXX is not set
CPU_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (
    "-std=c++20",
    "-O3",
    CPU_FLAG,
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    f"-I{FOLDER / 'include'}",
)
SHOWN_LINES = 5  # the last lines of a failing compiler's messages, which the error quotes
NEXT_STEP = "install a C++20 compiler such as g++, or name one in CXX"


def library(extra_flags: Sequence[str] = ()) -> Path:
    """Return the library for ``SessionOptions.register_custom_ops_library``, and compile it where it is not cached.

    The key of the cache covers the sources, the flags and every macro that the compiler predefines, which name its
    version and the instruction set of this CPU, because machines may share a home directory. A caller that can run
    without the library catches the error, and must show it.

    Raises:
        H1ExportError: There is no compiler, the compiler failed, or the cache cannot be written.
    """
    command = [*_compiler(), *FLAGS, *extra_flags]
    path = _cache() / _key(command) / NAME
    if not path.exists():
        _compile(command, path)
    return path


def _compiler() -> list[str]:
    """Return the words of $CXX, which may have arguments, or the first compiler on the path."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise H1ExportError("native kernels", f"no C++ compiler found ({', '.join(COMPILERS)})", NEXT_STEP)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "h1export" / "native"


def _key(command: list[str]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(_run([*command, "-E", "-dM", "-x", "c++", os.devnull]))
    for file in (*SOURCES, *HEADERS):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _compile(command: list[str], path: Path) -> None:
    """Compile into a temporary folder, then rename: other processes may do the same, and see nothing or all of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / NAME
            _run([*command, *map(str, SOURCES), "-o", str(made)])
            made.replace(path)
    except OSError as error:
        raise H1ExportError(
            path.parent, f"the native kernels cannot be written ({error.strerror})", "set XDG_CACHE_HOME"
        ) from None


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout
    except OSError as error:
        raise H1ExportError(command[0], f"cannot run this C++ compiler ({error.strerror})", NEXT_STEP) from None
    except subprocess.CalledProcessError as error:
        messages = " | ".join(error.stderr.decode(errors="replace").strip().splitlines()[-SHOWN_LINES:])
        raise H1ExportError(
            command[0], f"the native kernels do not compile (exit code {error.returncode}: {messages})", NEXT_STEP
        ) from None
