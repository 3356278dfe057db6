"""Journal: which tensors of a stage are written, so that the next build skips them after a kill.

A line is added once a tensor's bytes are in their file, with their sha256. Nothing is believed without it: a line may reach the
disk before the bytes it speaks of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# a file and a folder of a stage, never of an artifact
JOURNAL = ".journal"
SCRATCH = ".scratch"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Extent:
    """``length`` bytes from ``offset`` of ``file`` in the stage, a relative name with slashes: one tensor."""

    file: str
    tensor: str
    offset: int
    length: int


class Journal:
    """The extents of ``folder`` that are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self._written: dict[Extent, str] = dict(_read(self._path))

    @property
    def files(self) -> frozenset[str]:
        """Names of the files that hold an extent."""
        return frozenset(extent.file for extent in self._written)

    def add(self, extent: Extent, sha256: str) -> None:
        """Note that the bytes of ``extent`` are in its file."""
        self._written[extent] = sha256
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**asdict(extent), "sha256": sha256}) + "\n")

    def holds(self, extent: Extent) -> bool:
        """Whether ``extent`` was written and its bytes are still what they were."""
        wanted = self._written.get(extent)
        return wanted is not None and wanted == _sha256(self._folder / extent.file, extent)

    def remove(self) -> None:
        """The stage is complete: an artifact has no journal."""
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> Mapping[Extent, str]:
    """Whole lines from the top. The file is cut after them, because a kill may leave half a line."""
    written: dict[Extent, str] = {}
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            data = json.loads(line)
            sha256 = data.pop("sha256")
            extent = Extent(**data)
        except (ValueError, TypeError, KeyError, AttributeError):
            break
        if not line.endswith(b"\n"):
            break
        written[extent] = sha256
        whole += len(line)
    if path.is_file():
        os.truncate(path, whole)
    return written


def _sha256(file: Path, extent: Extent) -> str:
    digest = hashlib.sha256()
    left = extent.length
    try:
        with file.open("rb") as stream:
            stream.seek(extent.offset)
            while left and (data := stream.read(min(left, READ_BYTES))):
                digest.update(data)
                left -= len(data)
    except OSError:
        return ""
    return digest.hexdigest()
