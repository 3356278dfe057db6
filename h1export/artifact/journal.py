"""Journal: the list of the tensors that a stage already holds, so that the next build skips them after a kill.

A line is added with a tensor's sha256 once its bytes are in their file. The sha256 is checked before a tensor is
skipped, because after a crash the journal's line may be on the disk and the tensor's bytes not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from h1export import forms
from h1export.artifact.files import sha256_range
from h1export.forms import Count, Sha256

# A file and a folder that exist in a stage only; an artifact never holds them.
JOURNAL = ".journal"
SCRATCH = ".scratch"


@dataclass(frozen=True)
class Extent:
    """The bytes of one tensor in a file of a stage.

    Attributes:
        file: the file's name relative to the stage, with slashes.
        tensor: the tensor's name.
        offset: first byte.
        length: number of bytes.
    """

    file: str
    tensor: str
    offset: Count
    length: Count


@dataclass(frozen=True)
class Line(Extent):
    """An Extent with the sha256 of its bytes, as the journal notes it."""

    sha256: Sha256


class Journal:
    """The extents of the stage ``folder`` that are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self._written: dict[Extent, str] = dict(_read(self._path))

    @property
    def files(self) -> frozenset[str]:
        """Names of the files that hold a written extent."""
        return frozenset(extent.file for extent in self._written)

    def add(self, extent: Extent, sha256: str) -> None:
        """Record that the bytes of ``extent``, with this ``sha256``, are in its file."""
        self._written[extent] = sha256
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**asdict(extent), "sha256": sha256}) + "\n")

    def holds(self, extent: Extent) -> bool:
        """Return whether ``extent`` was written and its bytes still have the recorded sha256."""
        wanted = self._written.get(extent)
        return wanted is not None and wanted == _sha256(self._folder / extent.file, extent)

    def remove(self) -> None:
        """Delete the journal of a complete stage; an artifact has none."""
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> Mapping[Extent, str]:
    """Return the whole lines from the top, and cut the file after them, because a kill may leave half a line."""
    written: dict[Extent, str] = {}
    whole = 0
    for line in _lines(path):
        try:
            noted = forms.fill(Line, forms.from_json(line))
        except forms.FormError:
            break
        if not line.endswith(b"\n"):
            break
        written[Extent(noted.file, noted.tensor, noted.offset, noted.length)] = noted.sha256
        whole += len(line)
    if path.is_file():
        os.truncate(path, whole)
    return written


def _lines(path: Path) -> list[bytes]:
    """Return the lines of the journal, with their ends; none where there is no file that a build can have written."""
    try:
        return forms.read_bytes(path).splitlines(keepends=True)
    except (OSError, forms.FormError):
        return []


def _sha256(file: Path, extent: Extent) -> str:
    """Return the sha256 of an extent's bytes, or an empty text where ``file`` cannot be read."""
    try:
        with file.open("rb") as stream:
            return sha256_range(stream.fileno(), extent.offset, extent.length)
    except OSError:
        return ""
