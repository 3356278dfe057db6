"""Names, sizes and sha256 of the files of a folder. Symbolic links are listed, and never followed.

Names are relative to the folder, with slashes on every system.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from h1export.errors import H1ExportError

PAGE = "report.html"  # `h1export report` writes it into a finished artifact
NOT_PLAIN = -1
READ_BYTES = 1 << 20


def names(folder: Path) -> list[str]:
    """Return the sorted names of everything below ``folder`` that is not a folder; links to folders are included.

    Raises:
        OSError: a folder cannot be read.
    """
    found = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def folders(folder: Path) -> Iterator[Path]:
    """Yield every folder below ``folder``, inner folders before the folders that hold them, without ``folder`` itself.

    Raises:
        OSError: a folder cannot be read.
    """
    for place, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        if Path(place) != folder:
            yield Path(place)


def is_name(name: str) -> bool:
    """Return whether ``name`` is relative on every system: it has no '..', '.', empty part, backslash or colon."""
    return not {"\\", ":"} & set(name) and not {"", ".", ".."} & set(name.split("/"))


def plain_size(folder: Path, name: str) -> int | None:
    """Return the bytes of the regular file ``name`` of ``folder``, or None where there is no such file.

    The result is NOT_PLAIN where ``name`` fails ``is_name``, or where a symbolic link stands in the place of the file
    or of a folder that leads to it.
    """
    if not is_name(name):
        return NOT_PLAIN
    place = folder
    for part in name.split("/"):
        place /= part
        try:
            found = place.lstat()
        except (OSError, ValueError):
            return None
        if stat.S_ISLNK(found.st_mode):
            return NOT_PLAIN
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def sha256_file(file: Path) -> str:
    """Return the sha256 of a file's content as hex digits.

    Raises:
        H1ExportError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise H1ExportError(file, what, "check its permissions, or build the artifact again") from None


def sha256_range(descriptor: int, start: int, length: int) -> str:
    """Return the sha256 of ``length`` bytes from ``start`` of an open file as hex digits; the file may end earlier.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    end = start + length
    while start < end and (data := os.pread(descriptor, min(READ_BYTES, end - start), start)):
        digest.update(data)
        start += len(data)
    return digest.hexdigest()


def _raise(error: OSError) -> None:
    raise error
