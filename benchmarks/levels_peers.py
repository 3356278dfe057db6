"""Time prefills of one level of the CPU kernels beside llama.cpp's library for the same instructions, in paired rounds.

    python benchmarks/levels_peers.py OUT KERNELS --llama-bench BIN --gguf FILE \
        --pair avx2=libggml-cpu-haswell.so --pair avx512-vnni=libggml-cpu-icelake.so --prefill 512 2048

OUT and KERNELS are those of levels.py. llama.cpp is one that was built with GGML_CPU_ALL_VARIANTS, with every
libggml-cpu-*.so moved away from its programs: each run is told which one to load. A round runs the two once, one after
the other, and its ratio is between these runs; the table has medians, and the lowest and the highest ratio. Quote
figures of an idle machine only.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from unittest import mock

import numpy as np
from levels import libraries, runner, seconds
from llama_bench import LlamaBench
from rich.console import Console
from rich.table import Table

from h1export.artifact.artifact import Artifact
from h1export.report.checks import Phase
from h1export.validate.speed.worker import Timing

LIBRARY = "GGML_BACKEND_PATH"  # the environment variable from which llama.cpp's programs take a library


def pair(text: str) -> tuple[str, Path]:
    """Return the level and llama.cpp's library of LEVEL=FILE."""
    level, _, path = text.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text}: not LEVEL=FILE with a file that exists")
    return level, Path(path).resolve()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--pair", type=pair, action="append", required=True, metavar="LEVEL=FILE")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    artifact = Artifact.open(args.artifact)
    found = libraries(args.kernels)
    if len({level for level, _ in args.pair}) < len(args.pair):
        parser.error("one --pair for each level")
    if missing := [level for level, _ in args.pair if level not in found]:
        parser.error(f"{args.kernels} has no library of {missing} that this CPU runs; it has {sorted(found)}")
    runners = {level: runner(artifact, found[level], args.threads) for level, _ in args.pair}
    llama = LlamaBench(args.llama_bench, args.gguf, args.threads, steps=1)
    rng = np.random.default_rng(0)
    prompts = {count: rng.integers(0, artifact.config.vocab_size, (1, count)) for count in args.prefill}
    for one in runners.values():
        seconds(one, prompts[max(prompts)], 1)  # the first call allocates
    speeds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for level, path in args.pair:
            for count, ids in prompts.items():
                own = count / seconds(runners[level], ids, 1)[0]
                with mock.patch.dict(os.environ, {LIBRARY: str(path)}):
                    theirs = llama.speed(Timing(Phase.PREFILL, count))
                speeds.setdefault((level, count), []).append((own, theirs))
    table = Table(title=f"tokens per second, {args.threads} threads, {args.rounds} rounds")
    for heading in ("level", "prefill", "h1export", "llama.cpp", "ratio"):
        table.add_column(heading, justify="right")
    for (level, count), pairs in speeds.items():
        ratios = [own / theirs for own, theirs in pairs]
        medians = (f"{statistics.median(one):.4g}" for one in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(level, str(count), *medians, spread)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
