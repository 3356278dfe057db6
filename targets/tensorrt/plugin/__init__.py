"""The TensorRT plugin of the h1 ops: a C++ library with the kernels' machine code, built with CMake when needed.

In csrc/, library.cc is the entry point, plugin.h holds what both ops share, and ssm_scan.cc and causal_conv.cc are the
ops. schema.py and embed.py generate the headers and the machine code table that the sources include.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from h1export.errors import H1ExportError
from h1export.plugins.causal_conv import launch as conv
from h1export.plugins.gpu.cubin import ARCHITECTURES, Cubin, check_limits, compile_kernel
from h1export.plugins.gpu.kernel import Kernel
from h1export.plugins.ssm_scan import launch as scan
from h1export.runtime.code_cache import CacheRefusedError, cached
from h1export.runtime.compilers import CompilerFailedError, run_compiler
from h1export.targets.tensorrt.plugin.embed import digest, write_sources

NAME = "libh1export_plugin.so"
NEXT_STEP = "install the extra trt, which has CMake, a C++17 compiler and make"


def kernels(d_head: int, d_state: int, taps: int, *, dtype: str) -> tuple[Kernel, ...]:
    """Return all kernels that the layers of a model launch.

    Args:
        d_head: head dimension of the SSM.
        d_state: state size of the SSM.
        taps: taps of the causal convolution.
        dtype: dtype of the activations, "fp16" or "bf16".

    Raises:
        H1ExportError: there is no kernel for the head dimension and state size.
    """
    return (
        *scan.kernels(d_head, d_state, dtype),
        *(conv.kernel(dtype, taps, True, one_token=one) for one in (True, False)),
    )


def compile_all(wanted: Iterable[Kernel], architectures: Sequence[int] = ARCHITECTURES) -> list[Cubin]:
    """Compile the kernels for each of the compute capabilities ``architectures``, and check their use of registers.

    Raises:
        H1ExportError: Triton is missing or fails, or a kernel spills registers.
    """
    cubins = [compile_kernel(kernel, architecture) for kernel in wanted for architecture in architectures]
    for cubin in cubins:
        check_limits(cubin)
    return cubins


def library(cubins: Sequence[Cubin], tensorrt_include: Path | None = None) -> Path:
    """Return the plugin library that holds ``cubins``; it is built where the cache does not have it.

    The cache is ~/.cache/h1export/tensorrt or below XDG_CACHE_HOME, and its key covers sources and machine code.

    Args:
        cubins: the machine code.
        tensorrt_include: folder with the headers of an installed TensorRT; by default the headers of 10.14 that
            h1export has.

    Raises:
        CacheRefusedError: The cache cannot be written or trusted (h1export/runtime/code_cache.py).
        H1ExportError: CMake or a compiler is missing or fails.
    """

    def make(folder: Path) -> Path:
        return build(write_sources(folder / "source", cubins), folder / "build", tensorrt_include)

    return cached("tensorrt", digest(cubins, str(tensorrt_include or "")), NAME, make=make)


def write(folder: Path, wanted: Iterable[Kernel], architectures: Sequence[int]) -> dict[str, dict[str, int]]:
    """Write the plugin into ``folder``: its sources with the machine code, for CMake, and its library.

    Where the cache cannot be written or trusted, the library is built in ``folder``.

    Returns kernel symbol and architecture -> registers per thread, spilled bytes and bytes of shared memory.

    Raises:
        H1ExportError: Triton or CMake is missing or fails, or a kernel spills registers.
    """
    cubins = compile_all(wanted, architectures)
    folder.mkdir(exist_ok=True)
    write_sources(folder / "source", cubins)
    try:
        shutil.copyfile(library(cubins), folder / NAME)
    except CacheRefusedError:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.copyfile(build(folder / "source", Path(scratch)), folder / NAME)
    return {
        f"{cubin.kernel.symbol} sm_{cubin.architecture}": {
            "registers": cubin.registers,
            "spilled": cubin.spilled,
            "shared": cubin.shared,
        }
        for cubin in cubins
    }


def build(source: Path, folder: Path, tensorrt_include: Path | None = None) -> Path:
    """Build the library in ``folder`` from the sources that ``write_sources`` wrote to ``source``, and return its path.

    The compiler treats warnings as errors.

    Raises:
        H1ExportError: CMake or a compiler is missing or fails.
    """
    # The extra trt installs CMake beside Python, where PATH may not lead.
    cmake = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if cmake is None:
        raise H1ExportError("TensorRT plugin", "cmake is not installed", NEXT_STEP)
    include = [] if tensorrt_include is None else [f"-DH1EXPORT_TENSORRT_INCLUDE={tensorrt_include}"]
    _run([cmake, "-S", str(source), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *include])
    _run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    return folder / NAME


def _run(command: list[str]) -> None:
    try:
        run_compiler(command)
    except CompilerFailedError as error:
        raise H1ExportError("TensorRT plugin", f"cmake failed with {error}", NEXT_STEP) from None
