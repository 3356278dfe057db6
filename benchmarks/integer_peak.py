"""What share of the CPU's int8 peak QMatMul reaches with many tokens, at each level with instructions for int8.

    python benchmarks/integer_peak.py --tokens 512 --rounds 9

One thread. The peak is what a loop of the level's widest int8 instruction gets, with operands in registers
(integer_peak.cc); QMatMul unpacks weights, rounds activations, and scales each block's sums in float32 besides. All are
measured in turns, and the best of each counts, because a shared machine only ever makes them slower.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import kernels
import numpy as np
from rich.console import Console
from rich.table import Table

from h1export.targets.onnxruntime import kernel_build, native_library
from h1export.targets.onnxruntime.kernel_build import COMPILERS, Level

SOURCE = Path(__file__).with_suffix(".cc")


def peak(level: Level, folder: Path) -> Callable[[], float]:
    """Compile the loop for a level, and return a function that gives its int8 products a second."""
    path = folder / f"{level.name}.so"
    flags = ("-O3", "-std=c++20", "-shared", "-fPIC", *level.flags)
    subprocess.run([COMPILERS[0], *flags, SOURCE, "-o", path], check=True)
    function = ctypes.CDLL(str(path)).products_per_second
    function.restype = ctypes.c_double
    return lambda: float(function())


def product(level: Level, rows: int, columns: int, *, tokens: int) -> Callable[[], float]:
    """Return a function that gives the products a second of QMatMul as the level's library computes it."""
    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
    with mock.patch.object(kernels, "library", return_value=native_library.compiled(level.flags)):
        run = kernels.timed(kernels.NATIVE, x, rows, bits=4, group_size=32, count=2, threads=1)
    return lambda: rows * columns * tokens / run()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    features = kernel_build.cpu_features(native_library.CPUINFO.read_text())
    levels = kernel_build.levels_of(platform.machine(), features)[:-1]  # the last one has plain C++
    table = Table(title=f"int4, groups of 32, {args.tokens} tokens, one thread, best of {args.rounds}: GMAC/s, share")
    for heading in ("level", "peak", *(f"{rows} x {columns}" for rows, columns in kernels.SHAPES)):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as name:
        measured = [
            [peak(level, Path(name)), *(product(level, *shape, tokens=args.tokens) for shape in kernels.SHAPES)]
            for level in levels
        ]
        rounds = [[[run() for run in runs] for runs in measured] for _ in range(args.rounds)]
    for level, speeds in zip(levels, np.max(rounds, axis=0), strict=True):
        shares = (f"{speed / 1e9:.0f}, {speed / speeds[0]:.2f}" if speeds[0] else "refused" for speed in speeds[1:])
        table.add_row(level.name, f"{speeds[0] / 1e9:.0f}" if speeds[0] else "refused", *shares)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
