"""Print the resident bytes of this process after it loads OUT and after a prompt and a few tokens, and the most so far.

    python benchmarks/memory_held.py OUT PROMPT THREADS TOKENS

memory.py starts it. Beside what generation imports, it imports psutil alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import h1export
from h1export.host import peak_resident_bytes, resident_bytes
from h1export.runtime.generation import Sampling, generate


def main() -> None:
    """The command line."""
    out, prompt, threads, tokens = sys.argv[1], *map(int, sys.argv[2:])
    runner = h1export.load(Path(out), threads=threads)
    loaded = resident_bytes()
    ids = np.random.default_rng(0).integers(2, runner.config.vocab_size, prompt)
    for _ in generate(runner, ids, tokens, sampling=Sampling(), eos=frozenset()):
        pass
    print(loaded, resident_bytes(), peak_resident_bytes())


if __name__ == "__main__":
    main()
