"""Artifact: a built folder and its manifest; written beside its place and renamed into it as the last act.

The format is described in docs/artifact.md. Nothing in a manifest depends on a clock, a path or chance, so that one source
and one set of options give one set of bytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1export.core.spec import HybridSpec
from h1export.core.weights import Multiplier
from h1export.errors import H1ExportError

MANIFEST = "manifest.json"
FORMAT = 2
LINK = -1
REPORT = "report.json"  # written by validate into a finished artifact, so outside the manifest


@dataclass(frozen=True)
class StoredPart:
    """Where a quantised initializer holds one checkpoint tensor: ``size`` rows, or columns where the parts lie side by side."""

    tensor: str
    size: int
    multiplier: Multiplier


@dataclass(frozen=True)
class StoredWeight:
    """A quantised initializer: ``bits`` per code, one scale per ``block`` columns (0: per row), parts in order along ``axis``."""

    initializer: str
    bits: int
    block: int
    axis: int
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from and with, and what lies in it.

    Attributes:
        target: name of the target that made it and can load it.
        source: sha256 over the checkpoint's tensors.
        spec: HybridSpec as JSON values.
        scheme: the QuantScheme's fields.
        options: the target's options and the build switches.
        toolchain: package -> version that took part.
        inputs: graph input -> [dtype, dims].
        outputs: graph output -> [dtype, dims].
        weights: quantised initializers.
        files: name -> [sha256, bytes].
    """

    target: str
    source: str
    spec: Mapping[str, Any]
    scheme: Mapping[str, Any]
    options: Mapping[str, Any]
    toolchain: Mapping[str, str]
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    weights: tuple[StoredWeight, ...]
    files: Mapping[str, tuple[str, int]]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **_jsonable(dataclasses.asdict(self))}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str, where: Path) -> Manifest:
        """The inverse of to_json. Raises H1ExportError, naming ``where``, for anything else."""
        try:
            data = json.loads(text)
            version = data.pop("format")
            if type(version) is not int or version != FORMAT:
                raise H1ExportError(where, f"format {version!r}, and this h1export reads format {FORMAT}", "build the artifact again")
            data["weights"] = tuple(_stored_weight(item) for item in data["weights"])
            for side in ("inputs", "outputs"):
                data[side] = {name: (str(dtype), tuple(dims)) for name, (dtype, dims) in data[side].items()}
            data["files"] = {str(name): (_text(digest), _count(size)) for name, (digest, size) in data["files"].items()}
            for name in ("target", "source"):
                data[name] = _text(data[name])
            for name in ("spec", "scheme", "options", "toolchain"):
                data[name] = {**data[name]}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise H1ExportError(where, f"not a manifest of h1export ({error!r})", "build the artifact again") from None


def _jsonable(value: Any) -> Any:
    """JSON values only: tuples become lists, infinity becomes transformers' spelling of it."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return {"__float__": "Infinity"} if isinstance(value, float) and math.isinf(value) else value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{str(value)[:80]} is not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:80]} is not a count")
    return value


def _stored_weight(data: Mapping[str, Any]) -> StoredWeight:
    parts = tuple(StoredPart(_text(part["tensor"]), _count(part["size"]), _multiplier(part["multiplier"])) for part in data["parts"])
    bits, block, axis = (_count(data[name]) for name in ("bits", "block", "axis"))
    return StoredWeight(_text(data["initializer"]), bits, block, axis, parts)


def _multiplier(data: Mapping[str, Any]) -> Multiplier:
    return Multiplier(tuple((_count(rows), float(factor)) for rows, factor in data["runs"]))


@dataclass(frozen=True)
class Artifact:
    """A finished folder whose files are there in full length."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the manifest and check every file's size.

        Raises:
            H1ExportError: not an artifact, or files of the manifest missing, cut or grown. Other files are nobody's business.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise H1ExportError(folder, f"no {MANIFEST}", "give a folder that h1export build has made")
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise H1ExportError(path, f"cannot be read ({error.strerror})", "check its permissions") from None
        manifest = Manifest.parse(text, path)
        for name, (_, size) in manifest.files.items():
            file = folder / name
            found = _plain_size(file)
            if Path(name).name != name or found == LINK:
                raise H1ExportError(path, f"lists {name!r}, which is not a plain file of the folder", "build the artifact again")
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, and the manifest says {size}"
                raise H1ExportError(file, what, "build the artifact again")
        return cls(folder, manifest)

    def check_hashes(self) -> None:
        """Raises H1ExportError where a file's sha256 is not the manifest's."""
        for name, (digest, _) in self.manifest.files.items():
            if _sha256(self.folder / name) != digest:
                raise H1ExportError(self.folder / name, "was changed after the build", "build the artifact again")

    @property
    def spec(self) -> HybridSpec:
        """The architecture, from the artifact's own copy of config.json."""
        return HybridSpec.load(self.folder)


def _plain_size(file: Path) -> int | None:
    """Bytes of a regular file, LINK for a symbolic link, None for anything else and nothing."""
    try:
        found = file.lstat()
    except (OSError, ValueError):
        return None
    return LINK if stat.S_ISLNK(found.st_mode) else found.st_size if stat.S_ISREG(found.st_mode) else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_table(folder: Path) -> dict[str, tuple[str, int]]:
    """name -> (sha256, bytes) of every file in ``folder``."""
    return {file.name: (_sha256(file), file.stat().st_size) for file in sorted(folder.iterdir())}


@contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of ``out`` to fill; it becomes ``out`` on success and is removed on failure.

    A killed process leaves the sibling, unlocked; the next build at the same place removes it.

    Raises:
        H1ExportError: ``out`` exists and ``force`` is not given, is not something a build may replace, or cannot be made.
    """
    out = out.absolute()
    stage = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        if out.parent.is_dir():
            _restore_or_remove_aside(out)
            _remove_abandoned(out)
        _check_place(out, force)
        out.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        lock = _locked(stage)
    except (OSError, ValueError) as error:
        raise H1ExportError(out, f"cannot be made ({error})", "choose another OUT") from None
    try:
        yield stage
        _sync(stage)
        _check_place(out, force)
        _rename_into_place(stage, out)
    finally:
        os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def _locked(stage: Path) -> int:
    """A handle that keeps ``stage`` locked while it is open; without a lock there is no stage."""
    lock = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        stage.rmdir()
        raise
    return lock


def _check_place(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise H1ExportError(out, "exists", "choose another OUT, or replace it with --force")
    if not (out.is_dir() and not out.is_symlink() and (_is_artifact(out) or not any(out.iterdir()))):
        raise H1ExportError(out, "is not an artifact of h1export", "--force replaces artifacts only; choose another OUT")


def _is_artifact(folder: Path) -> bool:
    """Whether the manifest is ours: other people's folders have a manifest.json too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"format", "target", "files"} <= manifest.keys()


def _aside_name(out: Path) -> str:
    return f".{out.name}.aside"


def _restore_or_remove_aside(out: Path) -> None:
    """After a kill in the middle of an exchange in three steps: the old artifact goes back, unless the new one is in place."""
    aside = out.with_name(_aside_name(out))
    if aside.is_dir() and not aside.is_symlink() and _is_artifact(aside):
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(out)


def _remove_abandoned(out: Path) -> None:
    prefix = f".{out.name}.partial-"
    for stale in out.parent.iterdir():
        ours = stale.name.startswith(prefix) and stale.name.removeprefix(prefix).isdigit()
        if not ours or stale.is_symlink() or not stale.is_dir():
            continue
        try:
            handle = os.open(stale, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another build has just removed it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # a build that is still running
        else:
            shutil.rmtree(stale, ignore_errors=True)
        finally:
            os.close(handle)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _rename_into_place(stage: Path, out: Path) -> None:
    """``stage`` becomes ``out``; what was at ``out`` lies at ``stage`` then, for the caller to remove."""
    if out.exists():
        _exchange(stage, out)
    else:
        stage.rename(out)
    parent = os.open(out.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step (renameat2, Linux), so that a kill never finds ``b`` missing; else in three."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    aside = b.with_name(_aside_name(b))
    b.rename(aside)
    try:
        a.rename(b)
    except OSError:
        aside.rename(b)
        raise
    aside.rename(a)
