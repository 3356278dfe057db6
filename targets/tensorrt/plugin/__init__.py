"""The TensorRT plugin of the h1 ops: a C++ library that carries the kernels' machine code, built with CMake when first asked for.

csrc/plugin.h is what every op shares, csrc/ssm_scan.cc and csrc/causal_conv.cc the ops, csrc/library.cc the way in; schema.py and embed.py
generate what the sources take from Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from h1export.errors import H1ExportError
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.cubin import ARCHITECTURES, Cubin, check_limits, compile_kernel
from h1export.plugins.gpu.kernel import Kernel
from h1export.plugins.ssm_scan import launch as scan
from h1export.targets.tensorrt.plugin.embed import digest, write_sources

NAME = "libh1export_plugin.so"
SHOWN_LINES = 5  # of what a failing compiler says
NEXT_STEP = "install the extra trt, which has CMake, a C++17 compiler and make"


def kernels(d_head: int, d_state: int, taps: int, dtype: str) -> tuple[Kernel, ...]:
    """All kernels that a model's layers launch.

    Raises:
        H1ExportError: no kernel for the head dim and state size.
    """
    return (
        *scan.kernels(d_head, d_state, dtype),
        *(conv.kernel(dtype, taps, True, one_token=one) for one in (True, False)),
    )


def compile_all(wanted: Iterable[Kernel], architectures: Sequence[int] = ARCHITECTURES) -> list[Cubin]:
    """Machine code of kernels, within the limits.

    Raises:
        H1ExportError: Triton is missing or fails, or a kernel spills.
    """
    cubins = [compile_kernel(kernel, architecture) for kernel in wanted for architecture in architectures]
    for cubin in cubins:
        check_limits(cubin)
    return cubins


def library(cubins: Sequence[Cubin], tensorrt_include: Path | None = None) -> Path:
    """The plugin library that carries ``cubins``; built where the cache does not hold it.

    ``tensorrt_include``: headers of an installed TensorRT; by default ours, of 10.14. The cache's key covers sources and machine code.

    Raises:
        H1ExportError: no CMake or compiler, they fail, or the cache cannot be written.
    """
    path = _cache() / digest(cubins, str(tensorrt_include or "")) / NAME
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = build(write_sources(Path(folder) / "source", cubins), Path(folder) / "build", tensorrt_include)
            made.replace(path)  # others may do the same, and see nothing or all of it
    except OSError as error:
        raise H1ExportError(
            path.parent, f"the plugin cannot be written ({error.strerror})", "set XDG_CACHE_HOME"
        ) from None
    return path


def write(folder: Path, wanted: Iterable[Kernel], architectures: Sequence[int]) -> dict[str, dict[str, int]]:
    """Write ``folder``: the plugin's source with machine code, for CMake, and its library.

    Returns what each kernel takes of a GPU, by its symbol and architecture: registers a thread, bytes spilled, bytes of shared memory.

    Raises:
        H1ExportError: Triton or CMake is missing or fails, or a kernel spills.
    """
    cubins = compile_all(wanted, architectures)
    folder.mkdir(exist_ok=True)
    write_sources(folder / "source", cubins)
    shutil.copyfile(library(cubins), folder / NAME)
    return {
        f"{cubin.kernel.symbol} sm_{cubin.architecture}": {
            "registers": cubin.registers,
            "spilled": cubin.spilled,
            "shared": cubin.shared,
        }
        for cubin in cubins
    }


def build(source: Path, folder: Path, tensorrt_include: Path | None = None) -> Path:
    """Run CMake on sources that ``write_sources`` wrote; warnings are errors.

    Raises:
        H1ExportError: no CMake or compiler, or they fail.
    """
    cmake = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))  # of the extra trt
    if cmake is None:
        raise H1ExportError("TensorRT plugin", "no cmake found", NEXT_STEP)
    include = [] if tensorrt_include is None else [f"-DH1EXPORT_TENSORRT_INCLUDE={tensorrt_include}"]
    _run([cmake, "-S", str(source), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *include])
    _run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    return folder / NAME


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "h1export" / "tensorrt"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = " | ".join([line for line in lines if "rror" in line][:SHOWN_LINES] or lines[-SHOWN_LINES:])
        raise H1ExportError("TensorRT plugin", f"cmake failed with exit code {done.returncode}: {said}", NEXT_STEP)
