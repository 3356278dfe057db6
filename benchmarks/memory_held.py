"""Print the resident bytes of this process after it loads OUT and after a prompt and a few tokens, and the most so far.

    python benchmarks/memory_held.py OUT PROMPT THREADS TOKENS

memory.py starts it. It imports what generation imports and no more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import h1export
from h1export.runtime.generation import Sampling, generate

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Return bytes of this process: ``VmRSS``, or ``VmHWM`` for the most so far."""
    lines = (line.partition(":") for line in STATUS.read_text("ascii").splitlines())
    return next(int(value.split()[0]) * 1024 for name, _, value in lines if name == field)


def main() -> None:
    """The command line."""
    out, prompt, threads, tokens = sys.argv[1], *map(int, sys.argv[2:])
    runner = h1export.load(Path(out), threads=threads)
    loaded = resident("VmRSS")
    ids = np.random.default_rng(0).integers(2, runner.config.vocab_size, prompt)
    for _ in generate(runner, ids, tokens, sampling=Sampling(), eos=frozenset()):
        pass
    print(loaded, resident("VmRSS"), resident("VmHWM"))


if __name__ == "__main__":
    main()
