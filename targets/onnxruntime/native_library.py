"""Our own CPU kernels behind ONNX Runtime's custom-op interface, compiled for this machine at their first use.

csrc/library.cc lists the ops; each is one file beside it. An artifact that uses them also has a graph without them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from h1export.errors import H1ExportError
from h1export.runtime.code_cache import cached
from h1export.runtime.compilers import CompilerFailedError, run_compiler

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
NEXT_STEP = "install a C++20 compiler such as g++, or name one in CXX"


def library(extra_flags: Sequence[str] = ()) -> Path:
    """Return the library for ``SessionOptions.register_custom_ops_library``, and compile it where it is not cached.

    The key of the cache covers the sources, the flags and every macro that the compiler predefines, which name its
    version and the instruction set of this CPU, because machines may share a home directory. A caller that can run
    without the library catches the error, and must show it.

    Raises:
        H1ExportError: There is no compiler, the compiler failed, or the cache cannot be written or trusted
            (h1export/runtime/code_cache.py).
    """
    command = [*_compiler(), *FLAGS, *extra_flags]

    def make(folder: Path) -> Path:
        _run([*command, *map(str, SOURCES), "-o", str(folder / NAME)])
        return folder / NAME

    return cached("native", _key(command), NAME, make=make)


def _compiler() -> list[str]:
    """Return the words of $CXX, which may have arguments, or the first compiler on the path."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise H1ExportError("native kernels", f"no C++ compiler found ({', '.join(COMPILERS)})", NEXT_STEP)


def _key(command: list[str]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(_run([*command, "-E", "-dM", "-x", "c++", os.devnull]))
    for file in (*SOURCES, *HEADERS):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _run(command: list[str]) -> bytes:
    try:
        return run_compiler(command)
    except OSError as error:
        raise H1ExportError(command[0], f"cannot run this C++ compiler ({error.strerror})", NEXT_STEP) from None
    except CompilerFailedError as error:
        raise H1ExportError(command[0], f"the native kernels do not compile ({error})", NEXT_STEP) from None
