"""Time an artifact with each library of kernels that this CPU runs, against the one that is compiled here.

    python benchmarks/levels.py OUT KERNELS --rounds 9

OUT is an artifact of --target ort, and KERNELS a folder of libraries: h1export/targets/onnxruntime/kernels of a wheel.
All are loaded into one process and take turns; the ratios are medians of those of each round. The last column says
whether logits and states are the compiled library's bit for bit. Quote figures of an idle machine only.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.runtime.runner import Inspectable
from h1export.targets.onnxruntime import kernel_build, native_library

COMPILED = "compiled here"


def libraries(folder: Path) -> dict[str, Path]:
    """Return name -> the library compiled here, and those of ``folder`` that this CPU runs."""
    features = kernel_build.cpu_features(native_library.CPUINFO.read_text())
    found = {
        level.name: next(iter(sorted(folder.glob(f"{kernel_build.STEM}-{level.name}-*.so"))), None)
        for level in kernel_build.levels_of(platform.machine(), features)
    }
    return {COMPILED: native_library.compiled()} | {name: path for name, path in found.items() if path is not None}


def runner(artifact: Artifact, library: Path, threads: int) -> Inspectable:
    """Return a Runner over one library."""
    with mock.patch.object(native_library, "library", return_value=library):
        return load_runner(artifact, threads, kernels="native")


def seconds(runner: Inspectable, ids: np.ndarray, tokens: int) -> tuple[float, float, bytes]:
    """Return the seconds of a prefill of ``ids`` and of one decoded token, and what was computed."""
    session = runner.start(1, ids.shape[1] + tokens)
    start = time.perf_counter()
    logits = session.append(ids, keep=1)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(tokens):
        logits = session.append(np.argmax(logits[:, -1:], axis=-1))
    return prefill, (time.perf_counter() - start) / tokens, np.asarray(logits).tobytes()


def table(names: Sequence[str], rounds: Sequence[dict[str, tuple[float, float, bytes]]], prefill: int) -> Table:
    """Return the table of medians."""
    made = Table(title=f"{len(rounds)} rounds, prefill of {prefill} tokens")
    for heading in ("library", "prefill, tokens/s", "compiled / it", "decode, tokens/s", "compiled / it", "same bits"):
        made.add_column(heading, justify="right")
    for name in names:
        speeds = (statistics.median(one[name][part] for one in rounds) for part in (0, 1))
        ratios = [statistics.median(one[COMPILED][part] / one[name][part] for one in rounds) for part in (0, 1)]
        speed, step = speeds
        same = all(one[name][2] == one[COMPILED][2] for one in rounds)
        made.add_row(
            name, f"{prefill / speed:.1f}", f"{ratios[0]:.3f}", f"{1 / step:.1f}", f"{ratios[1]:.3f}", str(same)
        )
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="1: sessions do not wait for each other's threads")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    artifact = Artifact.open(args.artifact)
    runners = {name: runner(artifact, path, args.threads) for name, path in libraries(args.kernels).items()}
    ids = np.random.default_rng(0).integers(0, artifact.config.vocab_size, (1, args.prefill))
    for one in runners.values():
        seconds(one, ids, args.tokens)  # the first call allocates
    rounds = [{name: seconds(one, ids, args.tokens) for name, one in runners.items()} for _ in range(args.rounds)]
    Console(width=120).print(table(list(runners), rounds, args.prefill))


if __name__ == "__main__":
    main()
