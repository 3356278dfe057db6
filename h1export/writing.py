"""Files that appear complete or not at all, whatever the disk does and whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

import portalocker
from portalocker import LockFlags

from h1export.errors import H1ExportError

TOKEN_BYTES = 8  # of the random part of a new file's name
LONG_NAME = 200  # bytes; file systems allow 255
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_BESIDE = frozenset({errno.EACCES, errno.EPERM, errno.EBUSY})  # the folder's fault, and not that of the file
FREE_SPACE = "free some space or choose another place, and run again"


def write_into(folder: Path, name: str, data: bytes) -> None:
    """Write the file ``name`` of ``folder``, which may come from a stranger, completely or not at all.

    A link that stands in its place is replaced, and never followed.

    Args:
        folder: a folder that exists.
        name: a name without slashes.
        data: the content.

    Raises:
        H1ExportError: the file cannot be written.
    """
    try:
        with replacing(folder / name) as stream:
            stream.write(data)
    except (OSError, ValueError) as error:
        raise unwritten(folder / name, error) from None


def write_file(path: Path, data: bytes) -> None:
    """Write a file that the user has named, completely or not at all.

    A link is followed. What is no regular file, such as a pipe, is written to as it is, and so is a file in a folder
    where nothing else can be written.

    Raises:
        H1ExportError: the file cannot be written.
    """
    try:
        place = Path(os.path.realpath(path))
        if not place.exists() or place.is_file():
            try:
                with replacing(place, keep_mode=True) as stream:
                    stream.write(data)
            except OSError as error:
                if error.errno not in NOT_BESIDE or not place.exists():
                    raise
            else:
                return
        with open(path, "wb") as stream:
            stream.write(data)
    except (OSError, ValueError) as error:
        raise unwritten(path, error) from None


@contextmanager
def replacing(path: Path, keep_mode: bool = False) -> Iterator[BinaryIO]:
    """Yield a new file beside ``path`` to fill; it replaces ``path`` on success and is removed on failure.

    Its name is the stream's ``name``. A killed process leaves its file behind, unlocked, and the next call for the same
    ``path`` removes it. With ``keep_mode`` it gets the permissions of a file that it replaces.

    Raises:
        OSError: the file cannot be written.
        ValueError: ``path`` is no name of a file.
    """
    _remove_left(path)
    stream = _new_beside(path)
    beside = Path(stream.name)
    lock = os.dup(stream.fileno())  # a close may report that the disk is full, and the lock has to last longer
    try:
        if keep_mode and path.is_file():
            shutil.copymode(path, beside)
        yield stream
        stream.flush()
        os.fsync(lock)
        stream.close()
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    finally:
        for close in (stream.close, partial(os.close, lock)):
            with suppress(OSError):
                close()


def unwritten(path: Path, error: Exception) -> H1ExportError:
    """Return the error of a file or folder that could not be written."""
    number = error.errno if isinstance(error, OSError) else None
    what = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return H1ExportError(path, f"cannot be written ({what})", FREE_SPACE if number in FULL else "choose another place")


def _new_beside(path: Path) -> BinaryIO:
    """Open a new file beside ``path`` and lock it, as far as the file system has locks."""
    while True:
        beside = path.with_name(f".{_short(path.name)}.{token_hex(TOKEN_BYTES)}.partial")
        stream = open(beside, "xb")  # noqa: SIM115  the caller closes it; "x" follows no link and takes nobody's file
        try:
            if _lock_new(stream.fileno()) and beside.exists():
                return stream  # otherwise another process took it for a leftover before it was locked
        except BaseException:
            stream.close()
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        stream.close()


def _lock_new(handle: int) -> bool:
    """Lock a file; return False where another process has just done so. Not every file system has locks."""
    try:
        portalocker.lock(handle, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        return False
    except portalocker.LockException:
        pass
    return True


def _remove_left(path: Path) -> None:
    """Remove the files beside ``path`` that killed processes have left."""
    left = re.compile(rf"\.{re.escape(_short(path.name))}\.[0-9a-f]{{{2 * TOKEN_BYTES}}}\.partial")
    with suppress(OSError):
        for entry in path.parent.iterdir():
            if left.fullmatch(entry.name) and stat.S_ISREG(entry.lstat().st_mode):
                _remove_unlocked(entry)


def _remove_unlocked(file: Path) -> None:
    """Remove ``file`` unless a running process has locked it, or the file system has no locks."""
    with suppress(OSError):
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            portalocker.lock(handle, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
            file.unlink()
        except portalocker.LockException:
            pass
        finally:
            os.close(handle)


def _short(name: str) -> str:
    """Return a name to which a suffix can be added: ``name``, or a hash of one that is long."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONG_NAME else hashlib.sha256(encoded).hexdigest()[:16]
