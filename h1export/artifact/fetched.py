"""Artifacts of an object store: copied once to a machine, compared with the manifest, and whole or not there at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import portalocker

from h1export.artifact.artifact import Artifact
from h1export.artifact.files import READ_BYTES, is_name
from h1export.artifact.manifest import MANIFEST, Manifest
from h1export.artifact.signature import SIGNATURE
from h1export.artifact.staging import staged
from h1export.errors import H1ExportError, listed, native_error
from h1export.forms import MOST_BYTES

SCHEME = "://"
UNREADABLE = "cannot be read there"
LOOK = "look at the address, the rights to read it, and the package of fsspec for it"
KEY = 16  # digits of a folder's name
WAIT = 3600.0  # seconds for another process that fetches the same artifact


def fetched(place: str, cache: Path) -> Path:
    """Return the folder of an artifact that is in a folder, or at an address that fsspec reads, such as s3://b/falcon.

    What is at an address is copied into ``cache`` once, whoever asks for it on this machine, and a folder is returned
    as it is. The copy belongs to one manifest: where another artifact stands at the address later, it is fetched too.

    Raises:
        H1ExportError: It cannot be read, is no artifact, or has other bytes than its manifest says.
    """
    if SCHEME not in place:
        return Path(place)
    where = Path(place.partition(SCHEME)[2]) / MANIFEST
    with native_error(place, UNREADABLE, LOOK):
        import fsspec

        files, root = fsspec.url_to_fs(place.rstrip("/"))
        head = bytes(files.cat_file(f"{root}/{MANIFEST}", 0, MOST_BYTES))
        is_signed = files.exists(f"{root}/{SIGNATURE}")
        signature = bytes(files.cat_file(f"{root}/{SIGNATURE}", 0, MOST_BYTES)) if is_signed else b""
    manifest = Manifest.parse(head, where)
    digest = hashlib.sha256(head + signature).hexdigest()
    out = cache / f"{where.parent.name or 'artifact'}-{digest[:KEY]}"
    with _alone(cache, out):
        if not _is_whole(out):
            with staged(out, out.exists(), digest) as stage:
                (stage / MANIFEST).write_bytes(head)
                if is_signed:
                    (stage / SIGNATURE).write_bytes(signature)
                for name, (sha256, size) in manifest.files.items():
                    _copy(files, f"{root}/{name}", stage, name=name, sha256=sha256, size=size, place=place)
    return out


def _is_whole(out: Path) -> bool:
    """Return whether ``out`` is an artifact with all its files."""
    try:
        Artifact.open(out)
    except H1ExportError:
        return False
    return True


def _copy(files: Any, source: str, stage: Path, *, name: str, sha256: str, size: int, place: str) -> None:
    """Copy a file of ``size`` bytes; raise H1ExportError where it is another one than the manifest says."""
    if not is_name(name):
        raise H1ExportError(place, "its manifest lists a file outside the folder", "build the artifact again")
    target = stage / name
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    left = size
    with open(target, "xb") as out, native_error(place, UNREADABLE, LOOK), files.open(source, "rb") as stream:
        while part := stream.read(min(READ_BYTES, left + 1)):  # one byte more than there should be
            digest.update(part)
            left -= len(part)
            if left < 0:
                break
            out.write(part)
    if left or digest.hexdigest() != sha256:
        raise H1ExportError(listed(Path(place), name), "has other bytes than the manifest says", "copy it there again")


@contextmanager
def _alone(cache: Path, out: Path) -> Iterator[None]:
    """Wait until no other process of this machine fetches ``out``."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with portalocker.Lock(cache / f".{out.name}.lock", "a", timeout=WAIT, check_interval=0.2):
            yield
    except (OSError, portalocker.LockException) as error:
        what = f"artifacts cannot be kept there ({error})"
        raise H1ExportError(cache, what, "give another folder for them") from None
