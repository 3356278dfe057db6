"""What commands write with, without a model: a staged folder, a file, a weight file, the cache of compiled code."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from faults.cases import OUT, Case
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.stage import Stage
from h1export.artifact.staging import staged
from h1export.artifact.weight_file import Block, Columns, Rows, WeightFile
from h1export.runtime.code_cache import CacheRefusedError, cached
from h1export.runtime.continued import Continued
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.state_file import StateFile
from h1export.writing import write_file, write_into

KEYS = {"old": "0123456789abcdef", "new": "fedcba9876543210"}
TENSORS = 3


def no_words(_: Path) -> Sequence[str]:
    """Return no words: these cases are functions."""
    return ()


def _blocks(rows: Rows, by_columns: bool) -> list[Block]:
    """Return two halves of a tensor, of its rows or of its columns."""
    if by_columns:
        half = rows.shape[1] // 2
        parts = [Columns(rows[:, :half], 0), Columns(rows[:, half:], half * rows.itemsize)]
        return [partial(list, [part]) for part in parts]
    return [partial(list, [part]) for part in (rows[:2], rows[2:])]


def build(place: Path, force: bool, what: str = "new") -> int:
    """Write a folder with a small weight file and as much of a manifest as makes it an artifact."""
    with staged(place / OUT, force, KEYS[what]) as folder:
        (folder / "package" / "data").mkdir(parents=True, exist_ok=True)
        with WeightFile(Stage(folder), "package/data/weights") as file:
            for number in range(TENSORS):
                rows = np.arange(32, dtype=np.float32).reshape(4, 8) + (8 if what == "old" else number)
                extent = file.reserve(str(number), rows.nbytes, 64)
                file.write([extent], _blocks(rows, by_columns=number == 0))
        (folder / MANIFEST).write_text(json.dumps({"format": 1, "target": what, "files": {}}), "utf-8")
    return 0


def built(place: Path) -> None:
    """Put an older artifact there."""
    build(place, False, "old")


def written(place: Path) -> None:
    """Put an older file there."""
    (place / "a").write_text("old", "utf-8")


def homed(place: Path) -> None:
    """Make the folders of the cache."""
    place.chmod(0o755)
    for folder in ("h1export", "h1export/kind"):
        (place / folder).mkdir(0o700)


def into(place: Path) -> int:
    """Write into a folder."""
    write_into(place, "a", b"new" * 1000)
    return 0


def named(place: Path) -> int:
    """Write a file that a user has named."""
    write_file(place / "a", b"new" * 1000)
    return 0


def saved(place: Path) -> int:
    """Save the states of a chat; safetensors serialises them."""
    arrays = {"state": np.arange(1 << 16, dtype=np.float32)}
    StateFile("artifact", [{"role": "user", "content": "hello"}], Continued((1, 2), SavedStates(0, 2, arrays))).write(
        place / "talk.safetensors"
    )
    return 0


def compiled(place: Path) -> int:
    """Ask the cache for a library that it does not have."""

    def make(folder: Path) -> Path:
        (folder / "made.so").write_bytes(b"compiled" * 1000)
        return folder / "made.so"

    os.environ["XDG_CACHE_HOME"] = str(place)
    try:
        library = cached("kind", "key", "library.so", make=make)
    except OSError as error:  # of the compiler, which is this function
        raise CacheRefusedError(place, str(error.strerror), "free some space") from None
    return 0 if library.stat().st_size == 8000 else 1


def all_cases() -> list[Case]:
    """Return the cases."""
    return [
        Case("a staged folder", no_words, does=partial(build, force=False)),
        Case("a staged folder, replaced", no_words, built, does=partial(build, force=True)),
        Case("a file of a folder", no_words, written, does=into),
        Case("a named file", no_words, written, does=named),
        Case("a saved chat", no_words, does=saved),
        Case("compiled code", no_words, homed, does=compiled, may_finish=True),
    ]
