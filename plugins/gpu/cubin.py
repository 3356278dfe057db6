"""Kernels compiled ahead of time to machine code (a cubin) for one GPU architecture.

The compiler needs no GPU. It also reports the registers and memory that a kernel uses, which `check_limits` judges.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from h1export.errors import H1ExportError
from h1export.plugins.gpu import sdk
from h1export.plugins.gpu.kernel import ALIGNED, Kernel

# KiB of shared memory that a program may use (CUDA C++ Programming Guide, compute capabilities). From 90 on Triton
# compiles for the architecture-specific variant, such as sm_90a, whose code runs on that architecture only.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 121: 99}
ARCHITECTURES = tuple(SHARED_LIMIT)
# bytes that a thread may spill: by kernel, and for every other kernel
SPILL_LIMIT = {"decode": 0, "causal_conv": 0}
PREFILL_SPILL_LIMIT = 64
SCRATCH_POINTERS = (
    2  # Triton appends them to the arguments of a kernel; they point to memory that our kernels do not use
)
PTX_PARAMETERS = re.compile(r"\.entry \w+\((.*?)\)", re.DOTALL)
PTXAS_USAGE = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers", re.DOTALL)


@dataclass(frozen=True)
class Cubin:
    """The machine code of a kernel for one architecture, and the resources that it uses.

    Attributes:
        kernel: the kernel that was compiled.
        architecture: a number of ARCHITECTURES.
        code: the cubin, an ELF file.
        entry: the name of the function in ``code``.
        registers: the registers of a thread.
        spilled: the bytes that a thread stores to or loads from local memory for lack of registers.
        shared: the bytes of shared memory of a program.
    """

    kernel: Kernel
    architecture: int
    code: bytes
    entry: str
    registers: int
    spilled: int
    shared: int


def compile_kernel(kernel: Kernel, architecture: int) -> Cubin:
    """Compile a kernel for one of ARCHITECTURES.

    The same versions of Triton and its ptxas give the same bytes.

    Raises:
        H1ExportError: Triton is not installed, its interpreter is on, or its compiler or ptxas fails.
    """
    triton = sdk.triton()
    function = getattr(sdk.kernels(kernel.op), kernel.name)
    if not isinstance(function, triton.runtime.jit.JITFunction):
        raise H1ExportError(
            kernel.symbol,
            "cannot be compiled because Triton's interpreter is on",
            "unset TRITON_INTERPRET",
        )
    constants = dict(kernel.constants)
    log = io.StringIO()
    source = triton.compiler.ASTSource(
        fn=function,
        signature=kernel.signature() | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=_alignments(kernel),
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    try:
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True  # runs ptxas with -v, which reports the resources
            triton.knobs.compilation.always_compile = True  # a cached result would have no log
            triton.knobs.compilation.disable_line_info = True  # it would contain paths of this machine
            compiled = triton.compile(source, target=sdk.target(architecture), options=options)
    except Exception as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise H1ExportError(
            kernel.symbol, f"does not compile for sm_{architecture}: {last}", "choose other tiles"
        ) from error
    return _cubin(kernel, architecture, compiled, log=log.getvalue())


def check_limits(cubin: Cubin) -> None:
    """Check that a kernel spills no more than allowed and fits into the shared memory of its GPU.

    Raises:
        H1ExportError: one of the limits is exceeded.
    """
    where = f"{cubin.kernel.symbol} for sm_{cubin.architecture}"
    spill_limit = SPILL_LIMIT.get(cubin.kernel.name, PREFILL_SPILL_LIMIT)
    if cubin.spilled > spill_limit:
        raise H1ExportError(
            where,
            f"spills {cubin.spilled} bytes per thread, and at most {spill_limit} are allowed",
            "choose smaller tiles or more warps",
        )
    if cubin.shared > SHARED_LIMIT[cubin.architecture] * 1024:
        what = f"uses {cubin.shared} bytes of shared memory, and the limit is {SHARED_LIMIT[cubin.architecture]} KiB"
        raise H1ExportError(where, what, "choose smaller tiles or fewer stages")


def _alignments(kernel: Kernel) -> Mapping[tuple[int], list[list[Any]]]:
    """Tell Triton which arguments are multiples of ALIGNED: all pointers, and the integers of Kernel.aligned."""
    multiples = [i for i, (name, kind) in enumerate(kernel.arguments) if kind.startswith("*") or name in kernel.aligned]
    return {(i,): [["tt.divisibility", ALIGNED]] for i in multiples}


def _cubin(kernel: Kernel, architecture: int, compiled: Any, *, log: str) -> Cubin:
    usage = PTXAS_USAGE.search(log)
    if usage is None:
        raise H1ExportError(
            kernel.symbol,
            f"ptxas does not report the resources of the code for sm_{architecture}: {log!r}",
            "report this message to the maintainers of h1export",
        )
    parameters = PTX_PARAMETERS.search(compiled.asm["ptx"])
    metadata = compiled.metadata
    count = 0 if parameters is None else parameters[1].count(".param")
    if (
        count != len(kernel.arguments) + SCRATCH_POINTERS
        or metadata.global_scratch_size
        or metadata.profile_scratch_size
    ):
        what = (
            f"takes {count} arguments or needs scratch memory, and must take the {len(kernel.arguments)} of its "
            f"signature and {SCRATCH_POINTERS} null pointers, without scratch memory"
        )
        raise H1ExportError(kernel.symbol, what, "install the release of Triton that h1export[trt] requires")
    stores, loads, registers = map(int, usage.groups())
    return Cubin(
        kernel,
        architecture,
        compiled.asm["cubin"],
        entry=metadata.name,
        registers=registers,
        spilled=max(stores, loads),
        shared=metadata.shared,
    )
