"""Compiled libraries that are kept between processes, and are loaded only where nobody else can have written them.

A library lies at CACHE/h1export/KIND/KEY/NAME, and its SHA-256 beside it. CACHE is XDG_CACHE_HOME where that is an
absolute path, as the XDG Base Directory Specification asks, else ~/.cache. Every folder from the root down must belong
to this user or to root, be no link, and be writable by no other user; a folder above h1export may be writable by all
where its sticky bit lets nobody rename what is not his, as /tmp's does. The files must be this user's. docs/security.md
says what this keeps out, and what it does not.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import portalocker
from portalocker import LockFlags

from h1export.errors import H1ExportError

DIGEST_SUFFIX = ".sha256"  # of the file beside a library, in the format of sha256sum
PROJECT = "h1export"
WORK = ".work-"
ROOT = 0
PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what a rename says where the new name exists
NEXT_STEP = "set XDG_CACHE_HOME to a folder of yours that nobody else can write"

Make = Callable[[Path], Path]


class CacheRefusedError(H1ExportError):
    """The cache cannot be written, or somebody else could write in it."""


def cached(kind: str, key: str, name: str, *, make: Make) -> Path:
    """Return the library of ``key``, and make it where the cache has none that is whole and this user's alone.

    Processes may do so at once: a reader sees a whole library with its SHA-256, or none.

    Args:
        kind: The folder of the cache; the caller's alone.
        key: What the library was made from, as a name of a folder.
        name: The name of the library's file.
        make: ``make(folder)`` compiles in an empty folder, and returns the path of the library below it.

    Raises:
        CacheRefusedError: The cache cannot be written, or somebody else could write in it.
        H1ExportError: What ``make`` raises.
    """
    home = _home()
    with _named(home):
        folder = _private_folder(home, kind)
        entry = folder / key
        if is_whole(entry, name):
            return entry / name
        with _work_folder(folder) as work:
            (work / "make").mkdir(PRIVATE_FOLDER)
            (work / "make").chmod(PRIVATE_FOLDER)
            made = make(work / "make")
            _publish(_staged(work, made, name), entry, name, work=work)
    return entry / name


def is_whole(entry: Path, name: str) -> bool:
    """Whether folder ``entry`` has library ``name`` as it was made: both files this user's alone, the SHA-256 right."""
    library = entry / name
    note = entry / (name + DIGEST_SUFFIX)
    try:
        for path, is_kind in ((entry, stat.S_ISDIR), (library, stat.S_ISREG), (note, stat.S_ISREG)):
            state = path.lstat()
            if not is_kind(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & OTHERS_WRITE:
                return False
        return note.read_text("ascii") == _digest_line(library, name)
    except (OSError, UnicodeDecodeError):
        return False


def _home() -> Path:
    """Return the folder of the caches of this user.

    Raises:
        CacheRefusedError: Neither the environment nor the user database has an absolute path, or this system has no
            owners of files to check.
    """
    if not hasattr(os, "geteuid"):
        raise CacheRefusedError(
            "compiled code", "is not loaded where files have no POSIX owners", "use --kernels stock"
        )
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        import pwd  # POSIX only, as the check above has made sure

        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise CacheRefusedError("HOME", "names no home folder, and this user has none", NEXT_STEP)
    return Path(home, ".cache")


@contextmanager
def _named(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(Path(error.filename or home), error.strerror or str(error)) from None


def _refusal(path: Path, why: str) -> CacheRefusedError:
    return CacheRefusedError(path, f"compiled code cannot be written or loaded here ({why})", NEXT_STEP)


def _private_folder(home: Path, kind: str) -> Path:
    """Return the folder of ``kind``; folders that do not exist are made, whatever the umask, for this user alone.

    Raises:
        CacheRefusedError: Somebody else could write in it or replace it.
        OSError: It cannot be made.
    """
    at = Path(home.anchor)
    _check_folder(at, may_be_shared=True)
    for above in home.parts[1:]:
        at /= above
        _make_private(at)
        _check_folder(at, may_be_shared=True)
    for own in (PROJECT, kind):
        at /= own
        _make_private(at)
        _check_folder(at, may_be_shared=False)
    return at


def _make_private(folder: Path) -> None:
    if os.path.lexists(folder):
        return
    try:
        folder.mkdir(PRIVATE_FOLDER)
    except FileExistsError:
        return  # another process was faster; what it made is checked
    folder.chmod(PRIVATE_FOLDER)  # a umask takes bits away


def _check_folder(folder: Path, *, may_be_shared: bool) -> None:
    state = folder.lstat()
    if stat.S_ISLNK(state.st_mode):
        raise _refusal(folder, "it is a link; name the folder that it leads to")
    if not stat.S_ISDIR(state.st_mode):
        raise _refusal(folder, "it is no folder")
    if state.st_uid not in (ROOT, os.geteuid()):
        raise _refusal(folder, f"it belongs to user {state.st_uid}")
    shared = may_be_shared and state.st_mode & stat.S_ISVTX
    if state.st_mode & OTHERS_WRITE and not shared:
        raise _refusal(folder, f"other users can write it, mode {stat.S_IMODE(state.st_mode):o}")


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Give a private folder beside the entries, on their file system, and remove it.

    It is locked while it is in use; those of killed processes are not, and are removed too.
    """
    for left in folder.glob(f"{WORK}*"):
        with suppress(portalocker.LockException):  # this file system has no locks
            if (lock := _locked(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    lock = None
    while lock is None:  # another process may take a new folder for a left one before it is locked
        work = Path(tempfile.mkdtemp(prefix=WORK, dir=folder))
        try:
            lock = _locked(work)
        except portalocker.LockException:
            lock = os.open(work, os.O_RDONLY)
    try:
        work.chmod(PRIVATE_FOLDER)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _locked(work: Path) -> int | None:
    """Return a handle that locks the folder ``work``, or None where another process holds or has removed it.

    Raises:
        portalocker.LockException: the file system has no locks.
    """
    try:
        handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        portalocker.lock(handle, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
        if work.exists():
            return handle
    except portalocker.AlreadyLocked:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _staged(work: Path, made: Path, name: str) -> Path:
    """Return a folder below ``work`` with the library and its SHA-256, both on the disk."""
    staged = work / "entry"
    staged.mkdir(PRIVATE_FOLDER)
    staged.chmod(PRIVATE_FOLDER)
    library = staged / name
    made.replace(library)
    library.chmod(PRIVATE_FILE)
    note = staged / (name + DIGEST_SUFFIX)
    note.touch(PRIVATE_FILE)
    note.chmod(PRIVATE_FILE)
    note.write_text(_digest_line(library, name), "ascii")
    for path in (library, note, staged):
        _sync(path)
    return staged


def _publish(staged: Path, entry: Path, name: str, *, work: Path) -> None:
    """Rename the staged folder to ``entry``; an entry that is not whole gives way, one of another process stays."""
    attempt = 0
    while True:
        try:
            staged.rename(entry)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        else:
            return _sync(entry.parent)
        if is_whole(entry, name):
            return None
        with suppress(FileNotFoundError):  # another process has just taken it away
            entry.rename(work / f"broken-{attempt}")
        attempt += 1


def _digest_line(library: Path, name: str) -> str:
    with library.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
