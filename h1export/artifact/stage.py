"""Stage: the folder that a target fills. staging.py makes it and turns it into OUT."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """The folder that a target fills, and how it computes weights.

    Attributes:
        folder: the folder of the files.
        jobs: threads that compute weights.
        dry: the stage of a plan: weight files get their size and no content, and no weight is read.
    """

    folder: Path
    jobs: int = 1
    dry: bool = False


@contextmanager
def dry_stage() -> Iterator[Stage]:
    """Yield a dry stage in a temporary folder, which is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="h1export-plan-") as folder:
        yield Stage(Path(folder), dry=True)
