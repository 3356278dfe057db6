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
import itertools
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from levels import libraries, runner, seconds
from llama_bench import LlamaBench
from rich.console import Console
from rich.table import Table

from h1export.artifact.artifact import Artifact
from h1export.report.checks import Phase
from h1export.runtime.runner import Inspectable
from h1export.validate.speed.worker import Timing

LIBRARY = "GGML_BACKEND_PATH"  # the environment variable from which llama.cpp's programs take a library


def pair(text: str) -> tuple[str, Path]:
    """Return the level and llama.cpp's library of LEVEL=FILE."""
    level, _, path = text.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text}: not LEVEL=FILE with a file that exists")
    return level, Path(path).resolve()


Speeds = dict[tuple[str, int], tuple[list[float], list[float]]]  # level and prompt -> ours, llama.cpp's


def measure(
    pairs: Sequence[tuple[str, Path]],
    runners: Mapping[str, Inspectable],
    prompts: Sequence[np.ndarray],
    *,
    llama: LlamaBench,
    rounds: int,
) -> Speeds:
    """Return the tokens per second of each level and prompt [1, tokens], a pair a round."""
    for one in runners.values():
        seconds(one, max(prompts, key=np.size), 1)  # the first call allocates
    speeds: Speeds = defaultdict(lambda: ([], []))
    for _ in range(rounds):
        for (level, path), ids in itertools.product(pairs, prompts):
            tokens = ids.shape[1]
            ours, theirs = speeds[level, tokens]
            ours.append(tokens / seconds(runners[level], ids, 1)[0])
            with mock.patch.dict(os.environ, {LIBRARY: str(path)}):
                theirs.append(llama.speed(Timing(Phase.PREFILL, tokens)))
    return speeds


def table(speeds: Speeds, title: str) -> Table:
    """Return the table of medians, with the lowest and the highest ratio."""
    made = Table(title=title)
    for heading in ("level", "prefill", "h1export", "llama.cpp", "ratio"):
        made.add_column(heading, justify="right")
    for (level, tokens), (ours, theirs) in speeds.items():
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        made.add_row(level, str(tokens), f"{statistics.median(ours):.4g}", f"{statistics.median(theirs):.4g}", spread)
    return made


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
    levels = [level for level, _ in args.pair]
    if len(set(levels)) < len(levels):
        parser.error("one --pair for each level")
    if missing := set(levels) - found.keys():
        parser.error(f"{args.kernels} has no library of {sorted(missing)} that this CPU runs; it has {sorted(found)}")
    runners = {level: runner(artifact, found[level], args.threads) for level in levels}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, artifact.config.vocab_size, (1, count)) for count in args.prefill]
    llama = LlamaBench(args.llama_bench, args.gguf, args.threads, steps=1)
    speeds = measure(args.pair, runners, prompts, llama=llama, rounds=args.rounds)
    Console(width=120).print(table(speeds, f"tokens per second, {args.threads} threads, {args.rounds} rounds"))


if __name__ == "__main__":
    main()
