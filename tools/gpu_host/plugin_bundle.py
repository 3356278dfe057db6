"""Builds what the section plugin_launches takes to a GPU host: plugin libraries with machine code, and the harness.

Nothing here needs a GPU or the network; compiling the kernels needs Triton without its interpreter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from roofline import PUBLISHED, Shape

from gpu_host.plugin_driver import compile_programs
from h1export.checkpoint.resolve import embedded_model
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.plugins.gpu.cubin import Cubin
from h1export.plugins.gpu.kernel import Kernel
from h1export.targets.tensorrt.plugin import NAME, compile_all, kernels
from h1export.targets.tensorrt.plugin import build as build_library
from h1export.targets.tensorrt.plugin.embed import write_sources

ARCHITECTURE = 90  # of the GPU host; Triton compiles for sm_90a
ELSEWHERE = 120  # a library for this architecture only must be refused on the GPU host
OTHER = "another architecture"
DTYPES = ("fp16", "bf16")
Compile = Callable[[Iterable[Kernel], Sequence[int]], list[Cubin]]


def shapes() -> dict[str, Shape]:
    """Return the models whose layers the section runs, by the name of their folder."""
    config = FalconH1Config.load(embedded_model())
    embedded = Shape(
        "embedded",
        config.mamba_n_heads,
        config.mamba_d_head,
        d_state=config.mamba_d_state,
        groups=config.mamba_n_groups,
        taps=config.mamba_d_conv,
    )
    return {shape.model: shape for shape in (embedded, PUBLISHED[1])}


def build(folder: Path, compile_kernels: Compile = compile_all, models: Sequence[str] | None = None) -> None:
    """Write a library for each of ``models``, one for another architecture, and the harness into the new ``folder``.

    Args:
        folder: the folder; it must not exist.
        compile_kernels: makes machine code; a dry run gives stand-ins.
        models: names of ``shapes``; None for all.

    Raises:
        H1ExportError: Triton, CMake or a compiler is missing or fails.
    """
    made = {name: _kernels(shape, DTYPES) for name, shape in shapes().items() if models is None or name in models}
    made[OTHER] = [kernel for kernel in _kernels(shapes()["embedded"], DTYPES[:1]) if kernel.name == "decode"]
    with TemporaryDirectory() as scratch:
        sources = {}
        for name, wanted in made.items():
            cubins = compile_kernels(wanted, (ELSEWHERE if name == OTHER else ARCHITECTURE,))
            sources[name] = write_sources(Path(scratch) / name / "source", cubins)
        with ThreadPoolExecutor() as pool:  # each compiler is one process
            libraries = pool.map(lambda name: build_library(sources[name], Path(scratch) / name / "build"), made)
            for name, library in zip(made, libraries, strict=True):
                (folder / name).mkdir(parents=True)
                shutil.copyfile(library, folder / name / NAME)
        compile_programs(folder, sources[OTHER])


def _kernels(shape: Shape, dtypes: Sequence[str]) -> list[Kernel]:
    return [kernel for dtype in dtypes for kernel in kernels(shape.d_head, shape.d_state, shape.taps, dtype=dtype)]
