"""Our own CPU kernels behind ONNX Runtime's custom-op interface: a library of the wheel, or one compiled here.

A wheel has one library for each level of instructions (kernel_build.py), and the best one that this CPU has is loaded.
An installation without them, such as a clone's, compiles the kernels at their first use, for this CPU. csrc/library.cc
lists the ops; each is one file beside it. An artifact that uses them also has a graph without them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from h1export.errors import H1ExportError
from h1export.runtime.code_cache import cached
from h1export.runtime.compilers import CompilerFailedError, run_compiler
from h1export.targets.onnxruntime import kernel_build
from h1export.targets.onnxruntime.kernel_build import COMPILERS, HEADERS, SOURCES

NAME = f"{kernel_build.STEM}.so"
CPUINFO = Path("/proc/cpuinfo")
NEXT_STEP = "install a C++20 compiler such as g++, or name one in CXX"
_compiles: ContextVar[bool] = ContextVar("compiles", default=False)


def library() -> Path:
    """Return the library for ``SessionOptions.register_custom_ops_library``: the wheel's, else one compiled here.

    A caller that can run without the library catches the error, and must show it.

    Raises:
        H1ExportError: As ``compiled`` raises it.
    """
    found = None if _compiles.get() else packaged()
    return compiled() if found is None else found


@contextmanager
def compiling() -> Iterator[None]:
    """Let ``library`` compile, within this context, even where the installed wheel has a library for this CPU."""
    token = _compiles.set(True)
    try:
        yield
    finally:
        _compiles.reset(token)


def packaged() -> Path | None:
    """Return the library of the installed wheel for the best level that this CPU has; None where there is none.

    The names hold a hash of the sources and flags, so that one of another version is never taken.
    """
    if not sys.platform.startswith("linux") or not kernel_build.PACKAGED.is_dir():
        return None
    try:
        features = kernel_build.cpu_features(CPUINFO.read_text("ascii", errors="replace"))
    except OSError:  # then nothing is known of the CPU, and the level that every CPU has is taken
        features = frozenset()
    levels = kernel_build.levels_of(platform.machine(), features)
    paths = (kernel_build.PACKAGED / kernel_build.file_name(level) for level in levels)
    return next((path for path in paths if path.is_file()), None)


def compiled(extra_flags: Sequence[str] = ()) -> Path:
    """Return the library as it is compiled for this CPU, from the cache where that has it.

    The key of the cache covers the sources, the flags and every macro that the compiler predefines, which name its
    version and the instruction set of this CPU, because machines may share a home directory.

    Raises:
        H1ExportError: There is no compiler, the compiler failed, or the cache cannot be written or trusted
            (h1export/runtime/code_cache.py).
    """
    command = kernel_build.command(_compiler(), [*kernel_build.for_this_machine(platform.machine()), *extra_flags])
    return cached("native", _key(command), NAME, make=partial(_compile, command))


def _compile(command: list[str], folder: Path) -> Path:
    """Compile each source to an object in ``folder``, all cores at once, and return the library that they make."""
    from h1export.host import cores  # psutil would cost each start 20 ms

    objects = {source: str(folder / f"{source.stem}.o") for source in SOURCES}
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(lambda source: _run([*command, "-c", str(source), "-o", objects[source]]), objects))
    _run([*command, *objects.values(), "-o", str(folder / NAME)])
    return folder / NAME


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
    digest.update(kernel_build.sources_digest(SOURCES, HEADERS))
    return digest.hexdigest()[:32]


def _run(command: list[str]) -> bytes:
    try:
        return run_compiler(command)
    except OSError as error:
        raise H1ExportError(command[0], f"cannot run this C++ compiler ({error.strerror})", NEXT_STEP) from None
    except CompilerFailedError as error:
        raise H1ExportError(command[0], f"the native kernels do not compile ({error})", NEXT_STEP) from None
