"""The ranges of whole numbers on the command line: every one has an end, so that no mistake asks for years of work."""

from __future__ import annotations

import click

MOST_COUNT = 1 << 24  # tokens, bytes, sequences or rounds
MOST_THREADS = 1024
MOST_SEED = (1 << 63) - 1
THREADS = click.IntRange(0, MOST_THREADS)  # 0: the runtime's own choice
SEED = click.IntRange(0, MOST_SEED)


def count(least: int = 0) -> click.IntRange:
    """Return the range from ``least`` to ``MOST_COUNT``."""
    return click.IntRange(least, MOST_COUNT)
