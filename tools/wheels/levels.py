"""The numeric tests of the CPU kernels on every library of a wheel, on this CPU or in an emulator.

csrc/main.cc with the stand-in for ONNX Runtime of tools/sanitize is the program that computes a node.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from h1export.targets.onnxruntime import kernel_build, native_library
from h1export.targets.onnxruntime.kernel_build import Level

ROOT = Path(__file__).parents[2]
NATIVE_TESTS = ROOT / "tests" / "targets" / "onnxruntime" / "native"
TESTS = [NATIVE_TESTS / f"test_{name}.py" for name in ("matmul", "attention", "conv", "scan", "silu_mul", "halves")]
SYSROOT = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler
# level -> the command of an emulator whose CPU has that level and not the next
EMULATORS = {
    "sse2": ("qemu-x86_64", "-cpu", "Nehalem"),
    "neon": ("qemu-aarch64", "-L", SYSROOT, "-cpu", "cortex-a72"),
    "dotprod": ("qemu-aarch64", "-L", SYSROOT, "-cpu", "cortex-a76"),
    "i8mm": ("qemu-aarch64", "-L", SYSROOT, "-cpu", "max"),
}
COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}  # Debian's names, on every machine
HOST_FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
VARIABLE = "H1EXPORT_KERNEL_HOST"  # tests/kernel_hosts.py reads it


@dataclass(frozen=True)
class Outcome:
    """What became of one level: where it ran, if it did, and the last line of pytest."""

    level: str
    where: str
    result: str


def run(wheel: Path, pytest_options: Sequence[str] = ()) -> Iterator[Outcome]:
    """Yield the outcome of each level; raises CalledProcessError where a test fails."""
    machine = next(name for name in kernel_build.LEVELS if wheel.stem.endswith(name))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".so")])
        program = _host(folder, COMPILERS[machine])
        for level in kernel_build.LEVELS[machine]:
            (library,) = folder.rglob(kernel_build.file_name(level))
            command = _command(level, machine)
            if command is None:
                yield Outcome(level.name, "compiled only", "this CPU has not all of its instructions")
                continue
            where = " ".join(command[:1] + command[-1:]) if command else "this CPU"
            yield Outcome(level.name, where, _tests([*command, str(program), str(library)], pytest_options))


def _command(level: Level, machine: str) -> list[str] | None:
    """Return the words before the program: none on this CPU; None: neither it nor an emulator runs the level."""
    features = kernel_build.cpu_features(native_library.CPUINFO.read_text())
    if level.name in EMULATORS and shutil.which(EMULATORS[level.name][0]):
        return list(EMULATORS[level.name])
    return [] if machine == platform.machine() and level.features <= features else None


def _host(folder: Path, compiler: str) -> Path:
    program = folder / "kernel_host"
    stand_in = ROOT / "tools" / "sanitize" / "csrc"
    sources = (Path(__file__).parent / "csrc" / "main.cc", stand_in / "host.cc")
    include = ["-isystem", str(kernel_build.FOLDER / "include"), f"-I{stand_in}"]
    subprocess.run([compiler, *HOST_FLAGS, *include, *map(str, sources), "-o", str(program), "-ldl"], check=True)
    return program


def _tests(command: Sequence[str], pytest_options: Sequence[str]) -> str:
    environment = os.environ | {VARIABLE: shlex.join(command), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-q", *pytest_options, *map(str, TESTS)]
    start = time.monotonic()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return f"{done.stdout.strip().splitlines()[-1].partition(' in ')[0]} ({time.monotonic() - start:.0f} s)"
