"""Kernels compiled ahead of time, on a machine that needs no GPU: machine code for one architecture, and what it takes of a GPU."""

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

ARCHITECTURES = (
    80,
    86,
    89,
    90,
    100,
    120,
    121,
)  # from 90 on the architecture's own variant: sm_90a, which runs there and nowhere else
SHARED_LIMIT = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
    121: 99,
}  # KiB a program may have; CUDA C guide, compute capabilities
SPILL_LIMIT = {"decode": 0, "causal_conv": 0}  # bytes; others:
PREFILL_SPILL_LIMIT = 64
SCRATCH = 2  # pointers that Triton adds behind a kernel's arguments, to memory that ours do not use
PARAMETERS = re.compile(r"\.entry \w+\((.*?)\)", re.DOTALL)
USED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers", re.DOTALL)


@dataclass(frozen=True)
class Cubin:
    """``registers`` of a thread; ``spilled``: bytes that its code stores and loads for want of more; ``shared``: bytes of a program."""

    kernel: Kernel
    architecture: int
    code: bytes
    entry: str
    registers: int
    spilled: int
    shared: int

    @property
    def warps_in_flight(self) -> int:
        """On a multiprocessor of 64 Ki registers, which are handed out in steps of 8 a thread."""
        return 65536 // (-(-self.registers // 8) * 8 * self.kernel.threads) * self.kernel.warps


def compile_kernel(kernel: Kernel, architecture: int) -> Cubin:
    """Compile for one of ARCHITECTURES. The same versions of Triton and its ptxas give the same bytes.

    Raises:
        H1ExportError: Triton is not installed, or its compiler or ptxas fails.
    """
    triton = sdk.triton()
    function = getattr(sdk.kernels(kernel.op), kernel.name)
    if not isinstance(function, triton.runtime.jit.JITFunction):
        raise H1ExportError(
            kernel.symbol, "Triton's interpreter is on, which compiles nothing", "unset TRITON_INTERPRET"
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
            triton.knobs.nvidia.dump_ptxas_log = True  # with -v, it says what the code takes
            triton.knobs.compilation.always_compile = True  # a cached result has no log
            triton.knobs.compilation.disable_line_info = True  # paths of this machine
            made = triton.compile(source, target=sdk.target(architecture), options=options)
    except Exception as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise H1ExportError(
            kernel.symbol, f"does not compile for sm_{architecture}: {last}", "choose other tiles"
        ) from error
    return _cubin(kernel, architecture, made, log=log.getvalue())


def check_limits(cubin: Cubin) -> None:
    """Raises H1ExportError where a kernel spills more than it may, or takes more shared memory than its GPU has."""
    where = f"{cubin.kernel.symbol} for sm_{cubin.architecture}"
    most = SPILL_LIMIT.get(cubin.kernel.name, PREFILL_SPILL_LIMIT)
    if cubin.spilled > most:
        raise H1ExportError(
            where, f"spills {cubin.spilled} bytes a thread, allowed are {most}", "choose smaller tiles or more warps"
        )
    if cubin.shared > SHARED_LIMIT[cubin.architecture] * 1024:
        raise H1ExportError(
            where, f"takes {cubin.shared} bytes of shared memory", "choose smaller tiles or fewer stages"
        )


def _alignments(kernel: Kernel) -> Mapping[tuple[int], list[list[Any]]]:
    """Pointers and some integers are multiples of ALIGNED, in the form that Triton takes."""
    multiples = [i for i, (name, kind) in enumerate(kernel.arguments) if kind.startswith("*") or name in kernel.aligned]
    return {(i,): [["tt.divisibility", ALIGNED]] for i in multiples}


def _cubin(kernel: Kernel, architecture: int, made: Any, log: str) -> Cubin:
    found = USED.search(log)
    if found is None:
        raise H1ExportError(
            kernel.symbol,
            f"ptxas does not say what the code for sm_{architecture} takes: {log!r}",
            "report this with the text",
        )
    parameters = PARAMETERS.search(made.asm["ptx"])
    metadata = made.metadata
    count = 0 if parameters is None else parameters[1].count(".param")
    if count != len(kernel.arguments) + SCRATCH or metadata.global_scratch_size or metadata.profile_scratch_size:
        what = f"takes {count} arguments and scratch memory, and should take {len(kernel.arguments)}, two null pointers, and none"
        raise H1ExportError(kernel.symbol, what, "use the release of Triton that the extra trt names")
    stores, loads, registers = map(int, found.groups())
    return Cubin(
        kernel,
        architecture,
        made.asm["cubin"],
        entry=made.metadata.name,
        registers=registers,
        spilled=max(stores, loads),
        shared=made.metadata.shared,
    )
