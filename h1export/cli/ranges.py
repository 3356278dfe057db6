"""The ranges of whole numbers on the command line: every one has an end, so that no mistake asks for years of work."""

from __future__ import annotations

import click

MOST_COUNT = 1 << 24  # tokens, bytes, sequences or rounds
MOST_THREADS = 1024
MOST_SEED = (1 << 63) - 1


class Whole(click.IntRange):
    """Whole numbers from ``min`` to ``max``, whose upper end is far off and not worth a place in the help."""

    def _describe_range(self) -> str:
        return f"x>={self.min}" if self.min else ""


THREADS = Whole(0, MOST_THREADS)  # 0: the runtime's own choice
SEED = Whole(0, MOST_SEED)


def count(least: int = 0) -> Whole:
    """Return the range from ``least`` to ``MOST_COUNT``."""
    return Whole(least, MOST_COUNT)
