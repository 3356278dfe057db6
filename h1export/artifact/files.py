"""Tree: the files of a folder and of the folders in it, by relative name with slashes. Symbolic links are seen, never followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

NOT_PLAIN = -1


def names(folder: Path) -> list[str]:
    """Sorted names of everything below ``folder`` that is not itself a folder; links to folders among them.

    Raises:
        OSError: a folder that cannot be read.
    """
    found = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def folders(folder: Path) -> Iterator[Path]:
    """Every folder below ``folder``, those inside another before it; ``folder`` itself is left out."""
    for place, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        if Path(place) != folder:
            yield Path(place)


def is_name(name: str) -> bool:
    """Whether ``name`` is one that ``names`` could give on any system: relative, with neither '..', '.', empty parts nor backslashes."""
    return "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def plain_size(folder: Path, name: str) -> int | None:
    """Bytes of the regular file ``name`` of ``folder``; None where there is none.

    NOT_PLAIN: ``name`` is no name, or a symbolic link stands in its place or in that of a folder on the way.
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


def _raise(error: OSError) -> None:
    raise error
