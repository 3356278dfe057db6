"""Stage: the hidden folder beside OUT in which a build writes, renamed to OUT as the last act.

Its name carries a key of everything that decides the artifact's bytes, so the next build of the same artifact continues
where a killed build stopped. The journal in the stage lists what is written.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import portalocker
from portalocker import LockFlags

from h1export.artifact.files import folders, names
from h1export.artifact.journal import JOURNAL, SCRATCH, Journal
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.forms import read_bytes
from h1export.writing import FREE_SPACE, FULL, unwritten

KEY_LENGTH = 16  # hex digits of the key in a stage's name
TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})  # what a rename reports of a folder that exists
NOW = LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING


def check_place(out: Path, force: bool) -> None:
    """Check that a build may write to ``out``, before its work begins.

    Raises:
        H1ExportError: ``out`` cannot be made, exists without ``force``, or is neither an artifact nor an empty folder.
    """
    try:
        taken = out.exists() or out.is_symlink()
        place = out.absolute()
        parent = next((folder for folder in place.parents if folder.exists()), place)  # the root has no parents
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise PermissionError(f"nothing can be written into {parent}")
    except (OSError, ValueError) as error:
        raise H1ExportError(out, f"cannot be made ({error})", "choose another OUT") from None
    if taken and not force:
        raise _taken(out)
    if taken and not (out.is_dir() and not out.is_symlink() and (_is_artifact(out) or not any(out.iterdir()))):
        raise H1ExportError(
            out, "is not an artifact of h1export", "--force replaces artifacts only; choose another OUT"
        )


def _taken(out: Path) -> H1ExportError:
    return H1ExportError(out, "exists", "choose another OUT, or replace it with --force")


@contextmanager
def staged(out: Path, force: bool, key: str) -> Iterator[Path]:
    """Yield a folder beside ``out`` to fill; it becomes ``out`` on success and is removed on failure.

    A killed process leaves its folder behind, unlocked. The next build with the same ``key`` continues in it and finds
    the files that the journal names; a build with another key removes it.

    Raises:
        H1ExportError: ``check_place`` refuses ``out``, another process builds the same artifact there, or a file of the
            folder cannot be written.
    """
    out = out.absolute()
    stage = out.parent / f".{out.name}.partial-{key[:KEY_LENGTH]}"
    lock = None
    try:
        try:
            if out.parent.is_dir():
                _restore_or_remove_aside(out)
            check_place(out, force)
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = _claim(stage, out)
        except (OSError, ValueError, portalocker.LockException) as error:
            full = isinstance(error, OSError) and error.errno in FULL
            raise H1ExportError(
                out, f"cannot be made ({error})", FREE_SPACE if full else "choose another OUT"
            ) from None
        with _named_errors(out, stage):
            _remove_abandoned(out)
            _keep_written(stage)
            yield stage
            _seal(stage)
            check_place(out, force)
            _rename_into_place(stage, out, force)
    except BaseException:
        if lock is None:
            _remove_unclaimed(stage)
        elif _is_at(lock, stage):
            shutil.rmtree(stage, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def _named_errors(out: Path, stage: Path) -> Iterator[None]:
    """Turn an OSError of a file below ``stage``, or of a file whose name is not known, into an error of ``out``."""
    try:
        yield
    except OSError as error:
        named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if named and not any(name.is_relative_to(folder) for name in named for folder in (stage, out)):
            raise
        raise unwritten(out, error) from error


def _claim(stage: Path, out: Path) -> int:
    """Make the folder ``stage`` where it does not exist, and return a handle that locks it while it is open.

    Raises:
        H1ExportError: another process holds the lock.
        OSError: the folder belongs to another user.
        portalocker.LockException: the file system has no locks.
    """
    while True:
        with suppress(FileExistsError):
            stage.mkdir()
        try:
            lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another build has just removed or finished it
        try:
            portalocker.lock(lock, NOW)
            if os.fstat(lock).st_uid != os.geteuid():
                raise PermissionError(f"{stage} belongs to another user")
            if _is_at(lock, stage):
                return lock
        except BaseException as error:  # an interrupt too must release the lock
            os.close(lock)
            if isinstance(error, portalocker.AlreadyLocked):
                raise H1ExportError(
                    out, "another process builds the same artifact there", "wait for it, or choose another OUT"
                ) from None
            raise
        os.close(lock)


def _remove_unclaimed(stage: Path) -> None:
    """Remove ``stage`` if it is empty and no process has locked it.

    A claim that failed or was interrupted has made the folder and done no work in it.
    """
    with suppress(OSError, ValueError):  # a path that cannot exist was not made
        handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            portalocker.lock(handle, NOW)
        except portalocker.AlreadyLocked:
            return
        except portalocker.LockException:
            pass  # this file system has no locks
        finally:
            os.close(handle)
        stage.rmdir()


def _is_at(handle: int, path: Path) -> bool:
    """Return whether ``path`` is still the folder behind ``handle``.

    A stage may have become an artifact in between, and another build may have made a new stage of the same name.
    """
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _keep_written(stage: Path) -> None:
    """Remove the files that the journal does not name, which are small and written again, and empty folders."""
    kept = Journal(stage).files | {JOURNAL}
    for name in names(stage):
        if name not in kept or (stage / name).is_symlink():
            (stage / name).unlink()
    for folder in folders(stage):
        if not any(folder.iterdir()):
            folder.rmdir()


def _is_artifact(folder: Path) -> bool:
    """Return whether ``folder`` holds a manifest of h1export; other programs also write a file named manifest.json."""
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"format", "target", "files"} <= manifest.keys()


def _aside_name(out: Path) -> str:
    return f".{out.name}.aside"


def _restore_or_remove_aside(out: Path) -> None:
    """Put the old artifact back where a kill interrupted a replacement before the new one was in place."""
    aside = out.with_name(_aside_name(out))
    if aside.is_dir() and not aside.is_symlink() and _is_artifact(aside):
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(out)


def _remove_abandoned(out: Path) -> None:
    """Remove the stages of earlier builds at ``out`` that no running process has locked."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.partial-[0-9a-f]{{{KEY_LENGTH}}}")
    for stale in out.parent.iterdir():
        if not ours.fullmatch(stale.name):
            continue
        try:
            handle = os.open(stale, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # the path is not a folder, or another build has just removed it
        try:
            portalocker.lock(handle, NOW)
        except portalocker.LockException:
            continue  # the stage belongs to a build that is still running, or to this one
        else:
            if _is_at(handle, stale):
                shutil.rmtree(stale, ignore_errors=True)
        finally:
            os.close(handle)


def _seal(stage: Path) -> None:
    """Delete the scratch folder, flush every file and folder to the disk, and then delete the journal."""
    shutil.rmtree(stage / SCRATCH, ignore_errors=True)
    for path in (*(stage / name for name in names(stage)), *folders(stage)):
        _sync(path)
    Journal(stage).remove()
    _sync(stage)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; a file system may be unable to do that with a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def _rename_into_place(stage: Path, out: Path, force: bool) -> None:
    """Rename ``stage`` to ``out``, and delete what was at ``out``. A rename that is not sure to last is undone.

    Raises:
        H1ExportError: another build has finished at ``out`` meanwhile, and ``force`` is not given.
    """
    while True:
        old = _lock_old(out) if force else None
        if old is not None:
            try:
                _exchange(stage, out)
                _sync_or_undo(out, lambda: _exchange(stage, out))
                shutil.rmtree(stage, ignore_errors=True)
            finally:
                os.close(old)
            return None
        try:
            stage.rename(out)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            if not force:
                raise _taken(out) from None
        else:
            return _sync_or_undo(out, lambda: _take_back(out, stage))


def _lock_old(out: Path) -> int | None:
    """Return a handle that locks the folder ``out``, or None where there is none.

    After an exchange that folder has the stage's name, and while it is locked no other build may claim it.
    """
    while True:
        try:
            old = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            portalocker.lock(old, LockFlags.EXCLUSIVE)
            if _is_at(old, out):  # otherwise another build has just replaced it
                return old
        except BaseException:  # an interrupt too must release the lock
            os.close(old)
            raise
        os.close(old)


def _sync_or_undo(out: Path, undo: Callable[[], object]) -> None:
    """Flush the folder that holds ``out``; call ``undo`` where that fails.

    Raises:
        H1ExportError: the folder cannot be flushed.
    """
    try:
        _sync(out.parent)
    except OSError as error:
        try:
            undo()
        except OSError:  # the old artifact stays beside the new one until the next build
            what = f"is complete, but may be lost if the machine stops now ({error.strerror})"
            raise H1ExportError(out, what, FREE_SPACE) from None
        raise unwritten(out, error) from None


def _take_back(out: Path, stage: Path) -> None:
    """Rename ``out`` to ``stage``, or remove it: a disk on which no name can be changed still lets files go."""
    try:
        out.rename(stage)
    except OSError:
        shutil.rmtree(out)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step with Linux's renameat2, so that ``b`` always exists; elsewhere in three renames."""
    here = -100  # AT_FDCWD
    exchange = 2  # RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    aside = b.with_name(_aside_name(b))
    b.rename(aside)
    done = [(aside, b)]
    try:
        a.rename(b)
        done.append((b, a))
        aside.rename(a)
    except OSError:
        with suppress(OSError):
            for now, before in reversed(done):
                now.rename(before)
        raise
