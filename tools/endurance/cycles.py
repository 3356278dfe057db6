"""Load an artifact, compute with it and let it go, again and again in one process; the same for chat templates.

    python -m endurance.cycles load ARTIFACT COUNT [native|stock]
    python -m endurance.cycles template ARTIFACT COUNT

Exit code 1: the process holds more at the end than after the warm-up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import h1export
from endurance.steady import Cycles, repeat
from h1export.checkpoint.chat_template import ChatTemplate

WARM_UP = 50  # cycles, of a thousand
MESSAGES = [{"role": "user", "content": "How does it go?"}]


def loads(artifact: Path, kernels: Any, *, count: int, threads: int = 2) -> Cycles:
    """Load, prefill, decode, step and let go; every result must be the first one's."""
    ids = np.arange(1, 20)[None]
    first: list[Any] = []

    def work() -> None:
        runner: Any = h1export.load(artifact, threads, kernels=kernels)
        session = runner.start(1, 32)
        found = [session.append(ids), session.append(ids[:, :1])]
        found.append(runner.step(ids[:, :3], np.ones((1, 3), np.int64), runner.initial(1))[0])
        first.extend(found if not first else [])
        assert all(map(np.array_equal, found, first))

    return repeat(work, count, min(WARM_UP, count // 4))


def templates(artifact: Path, count: int) -> Cycles:
    """Render in a process of its own, and end it: every other time by ``close``, and else by letting it go."""
    number = iter(range(count))

    def work() -> None:
        template = ChatTemplate.read(artifact)
        assert MESSAGES[0]["content"] in template.render(MESSAGES)
        if next(number) % 2:
            template.process.close()

    return repeat(work, count, min(WARM_UP, count // 4))


def main(what: str, artifact: str, count: str, *kernels: str) -> int:
    """Print what was held, and return the exit code."""
    do: Callable[[], Cycles] = (
        (lambda: templates(Path(artifact), int(count)))
        if what == "template"
        else (lambda: loads(Path(artifact), *(kernels or ("auto",)), count=int(count)))
    )
    found = do()
    print(found)
    return int(bool(found.faults))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
