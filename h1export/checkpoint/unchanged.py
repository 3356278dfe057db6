"""Whether a checkpoint's files are those that were there when a build began."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from h1export.checkpoint.chat_template import TEMPLATE_FOLDER
from h1export.checkpoint.safetensors_header import WRITTEN
from h1export.errors import H1ExportError

# The suffixes of the files that are read; others, such as a log, may change.
READ = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
Identity = tuple[int, ...]


@dataclass(frozen=True)
class SourceFiles:
    """The files of checkpoint and adapter folders, as they were at one moment.

    Attributes:
        folders: the folders.
        found: file -> the device, number, size and times of what its path leads to, links followed.
    """

    folders: tuple[Path, ...]
    found: Mapping[Path, Identity]

    @classmethod
    def of(cls, folders: Iterable[Path]) -> SourceFiles:
        """Return the files as they are now.

        Raises:
            H1ExportError: a folder cannot be read.
        """
        places = tuple(folders)
        return cls(places, _identities(places))

    def check(self) -> None:
        """Check that every file is still the same one, with the same size and times, and that there is no other.

        Raises:
            H1ExportError: a file was changed, replaced, removed or added; the error names it.
        """
        now = _identities(self.folders)
        for file in sorted(self.found.keys() | now.keys()):
            if self.found.get(file) != now.get(file):
                what = "removed" if file not in now else "changed" if file in self.found else "added"
                raise H1ExportError(file, f"was {what} while the checkpoint was read", WRITTEN)


def _identities(folders: Iterable[Path]) -> dict[Path, Identity]:
    found: dict[Path, Identity] = {}
    places = list(folders)
    for folder in (*places, *(place / TEMPLATE_FOLDER for place in places if (place / TEMPLATE_FOLDER).is_dir())):
        try:
            names = os.listdir(folder)
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            raise H1ExportError(folder, what, "check the path and its permissions") from None
        for file in (folder / name for name in names):
            if file.suffix in READ:
                try:
                    is_now = file.stat()
                except OSError:
                    continue  # a link that leads nowhere is as good as no file
                found[file] = (is_now.st_dev, is_now.st_ino, is_now.st_size, is_now.st_mtime_ns, is_now.st_ctime_ns)
    return found
