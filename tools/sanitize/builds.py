"""Compiles our C++ with sanitizers: the CPU kernels with a stand-in for ONNX Runtime, and as the library it loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from h1export.targets.onnxruntime import kernel_build, native_library

HOST_SOURCES = tuple(sorted((Path(__file__).parent / "csrc").glob("*.cc")))
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
THREADS = ("-fsanitize=thread",)
COMMON = ("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread", "-DH1_EXACT_SCRATCH")
INCLUDE = kernel_build.FOLDER / "include"
# what a sanitizer does at its first report; 23 is an exit code that nothing else gives
REPORT = 23
ENVIRONMENT = {
    "ASAN_OPTIONS": f"exitcode={REPORT}:detect_stack_use_after_return=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={REPORT}:halt_on_error=1",
    "LSAN_OPTIONS": f"exitcode={REPORT}",
}


def compiler() -> str:
    """Return clang, whose sanitizers find more than GCC's, or say how to get it and exit."""
    found = shutil.which("clang++")
    if found is None:
        sys.exit("sanitize: clang++ is not installed; on Debian, apt-get install clang")
    return found


@dataclass(frozen=True)
class Build:
    """One way to compile the kernels and the stand-in.

    Attributes:
        name: its name, and that of its folder.
        flags: the CPU and the sanitizers.
        sources: the kernels' sources.
    """

    name: str
    flags: tuple[str, ...]
    sources: tuple[Path, ...] = native_library.SOURCES

    def compile(self, folder: Path, more: Sequence[str] = (), hosts: Sequence[Path] = HOST_SOURCES) -> Path:
        """Compile the program below ``folder``, a source at a time on every core; objects that are there are kept."""
        objects = folder / self.name
        objects.mkdir(parents=True, exist_ok=True)
        csrc = kernel_build.FOLDER / "csrc"
        command = [
            compiler(),
            *COMMON,
            *self.flags,
            *more,
            "-isystem",
            str(INCLUDE),
            f"-I{csrc}",
            f"-I{hosts[0].parent}",
        ]

        def one(source: Path) -> str:
            made = objects / f"{source.stem}.o"
            if not made.exists():
                subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(one, (*self.sources, *hosts)))
        program = objects / "nodes"
        subprocess.run([*command, *parts, "-o", str(program)], check=True)
        return program


def kernels(folder: Path) -> Path:
    """Compile the kernels as the library that ONNX Runtime loads into a process with the address sanitizer."""
    made = folder / "artifacts" / native_library.NAME
    made.parent.mkdir(parents=True, exist_ok=True)
    flags = [*COMMON, *MEMORY, "-shared-libsan", "-shared", "-march=native", "-fvisibility=hidden"]
    sources = map(str, native_library.SOURCES)
    subprocess.run([compiler(), *flags, "-isystem", str(INCLUDE), *sources, "-o", str(made)], check=True)
    return made


def address_sanitizer() -> Path:
    """Return the sanitizer's library, which must be loaded before Python."""
    machine = os.uname().machine
    name = f"libclang_rt.asan-{machine}.so"
    asked = subprocess.run([compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return Path(asked.stdout.strip())
