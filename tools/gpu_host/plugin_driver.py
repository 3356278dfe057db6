"""Calls a plugin library as TensorRT does, over CUDA's driver or over a stand-in for it that records launches.

The programs are in driver/: harness.cc, which does what TensorRT does to a plugin, and fake_cuda.cc, a libcuda.so.1 for
machines without a GPU. Machine code for the stand-in is a text that names the kernel (``image``).
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from roofline import Shape

from h1export.plugins.gpu.cubin import Cubin
from h1export.plugins.gpu.kernel import Kernel, Launch
from h1export.plugins.ssm_scan import launch as scan
from h1export.targets.tensorrt.plugin.schema import OPS, Arguments, Op

DRIVER = Path(__file__).parent / "driver"
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC")
# The GPU host's libraries may be older than those of the machine that compiles.
STATIC = ("-static-libstdc++", "-static-libgcc")
HARNESS = "harness"
STAND_IN = "stand-in"  # the folder of the libcuda.so.1 that records
PAGE = 4096  # over the stand-in, tensor i is at PAGE * (i + 1)
STREAM = 77
WORKSPACE_ALIGNMENT = 256
LETTERS = {"fp16": "h", "bf16": "b"}
SCAN, CONV = OPS
SCAN_FIELDS = {"chunk_size": "i 128", "dt_min": "f 0.001", "dt_max": "f inf", "state_in_place": "i 0"}


def image(kernel: Kernel, architecture: int) -> str:
    """Return the stand-in for a kernel's machine code, a text that the stand-in's driver prints at a launch."""
    return f"code of {kernel.symbol} for sm_{architecture}"


def stand_ins(kernels: Iterable[Kernel], architectures: Sequence[int]) -> list[Cubin]:
    """Return the stand-ins for the machine code of ``kernels``."""
    return [
        Cubin(k, sm, f"{image(k, sm)}\0".encode(), entry=k.name, registers=0, spilled=0, shared=1000 + sm)
        for k in kernels
        for sm in architectures
    ]


def compile_programs(folder: Path, source: Path, flags: Sequence[str] = ()) -> None:
    """Compile the harness and the stand-in for the driver into ``folder``; ``source`` is a plugin's source folder.

    ``flags`` are more flags for the compiler, such as a sanitizer's.
    """
    (folder / STAND_IN).mkdir(parents=True)
    (folder / "kinds.h").write_text(kinds(), encoding="utf-8")
    include = [f"-I{folder}", "-isystem", str(source / "include"), "-isystem", str(source / "cuda")]
    compiler = shutil.which("c++") or "c++"
    programs = (
        ("fake_cuda", f"{STAND_IN}/libcuda.so.1", ["-shared", "-Wl,-soname,libcuda.so.1"]),
        ("harness", HARNESS, ["-ldl"]),
    )
    for name, made, more in programs:
        command = [
            compiler,
            *FLAGS,
            *(() if flags else STATIC),
            *flags,
            *include,
            str(DRIVER / f"{name}.cc"),
            "-o",
            str(folder / made),
            *more,
        ]
        subprocess.run(command, check=True)


def kinds() -> str:
    """Return the C++ header that tells the stand-in the arguments of each kernel, with a letter for each."""

    def letters(arguments: Arguments) -> str:
        return "".join("p" if kind[0] == "*" else kind[0] for _, kind in arguments)

    rows = [
        f'if (!std::strcmp(kernel, "{name}")) return "{letters(arguments)}";'
        for op in OPS
        for name, arguments in op.kernels.items()
    ]
    return "\n".join(
        ["#include <cstring>", "inline char const* kinds(char const* kernel) {", *rows, "return nullptr;", "}", ""]
    )


@dataclass(frozen=True)
class Harness:
    """The harness on a plugin library.

    Attributes:
        programs: the folder that ``compile_programs`` filled.
        library: the plugin library.
        environment: variables of its process; LD_LIBRARY_PATH leads to a stand-in for the driver.
    """

    programs: Path
    library: Path
    environment: Mapping[str, str]

    def __call__(self, cases: Sequence[str]) -> list[list[str]]:
        """Return the lines that each case printed. A process that ends before its last case ends them with "died"."""
        done = subprocess.run(
            [str(self.programs / HARNESS), str(self.library)],
            input="\n".join(cases),
            capture_output=True,
            text=True,
            errors="replace",
            env=dict(self.environment),
        )
        before, *found = [part.splitlines() for part in done.stdout.split("case\n")]
        if done.returncode != 0:
            lines = [*(found.pop() if found else before), *done.stderr.splitlines(), f"died {done.returncode}"]
            found.append(lines)
        return found


def sizes_of(shape: Shape, batch: int, tokens: int) -> dict[str, int]:
    """Return every size that occurs in the shapes of the plugin's inputs."""
    sizes = {
        "batch": batch,
        "tokens": tokens,
        "heads": shape.heads,
        "groups": shape.groups,
        "d_head": shape.d_head,
        "d_state": shape.d_state,
    }
    return sizes | {"channels": shape.channels, "kept": shape.taps - 1, "taps": shape.taps, "one": 1}


def tensors(op: Op, sizes: Mapping[str, int], dtype: str) -> list[str]:
    """Return the inputs of a case, each in the text form that the harness reads."""
    found = []
    for name in op.inputs:
        dims = [str(sizes[size]) for size in op.shapes[name].split()]
        found.append(" ".join((LETTERS[dtype] if op.kind(name) == "*dtype" else "f", str(len(dims)), *dims)))
    return found


def case(
    op: Op,
    inputs: Sequence[str],
    fields: Mapping[str, str],
    *,
    gpu: int = 80,
    refused: int = 0,
    in_place: int = 0,
    tamper: int = 0,
    broken: str = "-",
    data: Path | None = None,
    called: Sequence[str] = (),
) -> str:
    """Return the line of a case for the harness; harness.cc says what the words are."""
    given = " ".join(f"{name} {value}" for name, value in fields.items())
    head = f"{op.name} {gpu} {refused} {in_place} {tamper} {broken} {data or '-'} {len(fields)} {given}"
    return f"{head} {len(inputs)} {' '.join(inputs)} {len(called)} {' '.join(called)}"


def expected(
    op: Op, launches: Sequence[Launch], gpu: int, *, in_place: bool, parts: Mapping[str, int]
) -> Iterator[str]:
    """Yield the lines that the stand-in writes for the launches; ``parts`` has the workspace's parts by address."""
    names = [*op.inputs, "y", "new_state"]
    addresses = {name: PAGE * (i + 1) for i, name in enumerate(names)} | dict(parts)
    if in_place:
        addresses["new_state"] = addresses["state"]
    for launch in launches:
        values = [addresses[value] if isinstance(value, str) else value for value in launch.values]
        texts = [f"{torch.tensor(v).float().item():.9g}" if isinstance(v, float) else str(v) for v in values]
        grid = " ".join(map(str, launch.grid))
        where = f"{grid} {launch.kernel.threads} {1000 + gpu} {STREAM}"
        yield f"launch {image(launch.kernel, gpu)} | {where} | {' '.join(texts)} 0 0"


def layout(problem: scan.Problem, start: int) -> tuple[dict[str, int], int]:
    """Return the addresses of the workspace's parts, and its size in bytes."""
    addresses = {}
    at = 0
    for name, (shape, dtype) in problem.workspace().items():
        addresses[name] = start + at
        at += -(-math.prod(shape) * dtype.itemsize // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    return addresses, at


def workspace_start(op: Op) -> int:
    """Return the address of the workspace over the stand-in, behind the inputs and the two outputs."""
    return PAGE * (len(op.inputs) + 3)
