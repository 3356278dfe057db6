"""Instructions for one product of a weight and an activation on AArch64: h1export's kernels beside llama.cpp's.

    python benchmarks/instructions.py --llama-cpp SOURCE [--folder FOLDER] [--tokens 1 64 256] [--shape 4096 1024]

No such CPU is needed, and no time is measured. A cross compiler makes a program of each side (folder instructions/),
QEMU runs it on one thread, and a plugin of QEMU counts. A matrix product is computed once and then twice, and the
difference counts, so that nothing else does: int4 in blocks of 32 at accuracy level 4 beside Q4_0, both with the
rounding of activations. Every run is checked against the product in double, and every count by its multiplying
instructions: SDOT has 16 products and SMMLA 32.

It needs Debian's gcc, g++-aarch64-linux-gnu, cmake and qemu-user (7.2), and a source tree of llama.cpp, whose ggml is
compiled in FOLDER (two minutes a level), or without one in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from h1export.targets.onnxruntime import kernel_build
from h1export.targets.onnxruntime.kernel_build import Level

SOURCES = Path(__file__).with_suffix("")
LEVELS = kernel_build.LEVELS["aarch64"][:-1]  # the last one has plain C++
KINDS = ("sdot", "smmla", "vector", "load", "store", "prefetch", "scalar")
MOST_ERROR = 1e-2  # of the root mean square; rounding activations to int8 by blocks costs some 5e-3
TOOLS = "aarch64-linux-gnu-"
PACKAGES = {"gcc": "gcc", f"{TOOLS}g++": "g++-aarch64-linux-gnu", "cmake": "cmake", "qemu-aarch64": "qemu-user"}


def run(*words: object) -> str:
    """Run a command and return what it printed; ends the program with that where it fails."""
    done = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{words[0]}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def ours(level: Level, folder: Path) -> Path:
    """Compile the driver of h1export's kernels as a wheel's library is compiled, but for ``-shared``."""
    program = folder / f"ours-{level.name}"
    flags = [flag for flag in kernel_build.FLAGS if flag != "-shared"]
    include = f"-I{kernel_build.FOLDER / 'csrc'}"
    run(f"{TOOLS}g++", *flags, *level.flags, include, "-static", SOURCES / "ours.cc", "-o", program)
    return program


def ggml(level: Level, folder: Path, source: Path) -> Path:
    """Compile llama.cpp's ggml for the level, with what its build chooses by default, and the driver."""
    build = folder / f"ggml-{level.name}"
    (march,) = level.flags
    options = {
        "LLAMA_CPP": source.resolve(),
        "GGML_CPU_ARM_ARCH": march.removeprefix("-march="),
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{TOOLS}gcc",
        "CMAKE_CXX_COMPILER": f"{TOOLS}g++",
    }
    run("cmake", "-S", SOURCES, "-B", build, *(f"-D{name}={value}" for name, value in options.items()))
    run("cmake", "--build", build, "--target", "ggml_product")
    return build / "ggml_product"


def counted(folder: Path, program: Sequence[object], sizes: Sequence[int]) -> dict[str, int]:
    """Run a driver; kind -> instructions of the whole program; ``sizes``: rows, columns, tokens, repeats."""
    counts = folder / "counts"
    plugin = f"{folder / 'count.so'},counts={counts}"
    printed = run("qemu-aarch64", "-plugin", plugin, *program, *sizes)
    error = float(printed.splitlines()[-1])  # behind what ggml has to say
    if not error < MOST_ERROR:
        sys.exit(f"{program[0]}: the product is wrong by {error} of its root mean square")
    return {kind: int(count) for kind, count in map(str.split, counts.read_text().splitlines())}


def of_a_product(folder: Path, program: Sequence[object], sizes: Sequence[int]) -> dict[str, float]:
    """Kind -> instructions for one weight and one activation; ``sizes``: rows, columns, tokens."""
    once, twice = (counted(folder, program, (*sizes, repeats)) for repeats in (1, 2))
    rows, columns, tokens = sizes
    found = {kind: (twice[kind] - once[kind]) / (rows * columns * tokens) for kind in KINDS}
    products = 16 * found["sdot"] + 32 * found["smmla"]
    if abs(products - 1) > 0.01:
        sys.exit(f"{program[0]}: SDOT and SMMLA have {products:.3f} of the products, expected all of them")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="SOURCE")
    parser.add_argument("--folder", type=Path, help="where programs are compiled, and kept")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 1024], metavar=("ROWS", "COLUMNS"))
    args = parser.parse_args()
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if missing:
        sys.exit(f"instructions: on Debian, apt-get install {' '.join(missing)}")
    table = Table(title=f"instructions for a weight and an activation, {' x '.join(map(str, args.shape))}")
    for heading in ("level", "tokens", "program", "all", *KINDS):
        table.add_column(heading, justify="right")
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        run("gcc", "-O2", "-shared", "-fPIC", SOURCES / "count.c", "-o", folder / "count.so")
        for level in LEVELS:
            theirs = ggml(level, folder, args.llama_cpp)
            programs = {
                "h1export": (ours(level, folder),),
                "llama.cpp, repacked": (theirs, "repacked"),
                "llama.cpp, as stored": (theirs, "stored"),
            }
            for tokens in args.tokens:
                for name, program in programs.items():
                    found = of_a_product(folder, program, (*args.shape, tokens))
                    shown = (f"{count:.4f}" for count in (sum(found.values()), *found.values()))
                    table.add_row(level.name, str(tokens), name, *shown)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
