"""Join the parts of a bundle, on plain python3 and the standard library.

    python3 join.py PARTS [PARTS ...] --out bundle [--groups core,shape]

Every folder PARTS holds parts that arrived, and index.json. A part is checked, then kept in the folder of the bundle,
so that parts may come in several transfers: join again after each. A group is unpacked when it has all its parts. The
exit code is 2 while a wanted group is not complete, and whenever a file is not what the index says.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

INDEX = "index.json"
FORMAT = 1
KEPT = ".parts"  # below the bundle: parts of groups that are not complete
DONE = ".joined"  # below the bundle: a file for each group that was unpacked, with its sha256
GROUP = re.compile(r"[a-z]{1,20}")
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK = 1 << 20

Groups = dict[str, dict[str, Any]]


class JoinError(Exception):
    """What is wrong and the next step, in one line."""


def part_name(group: str, number: int) -> str:
    """Return the file name of a group's part, such as core.001.part."""
    return f"{group}.{number:03d}.part"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_index(path: Path) -> Groups:
    """Return group -> {"sha256": of the whole, "parts": [{"name", "bytes", "sha256"}, ...]}.

    Raises:
        JoinError: it is no index of this format, or names anything but the parts of its groups in order.
    """
    wrong = JoinError(f"{path}: is damaged or of another format; copy it again from the machine that made the bundle")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JoinError(f"{path}: cannot be read ({error.strerror}); copy it beside the parts") from None
    except (ValueError, RecursionError):
        raise wrong from None
    groups = read.get("groups") if isinstance(read, dict) and read.get("format") == FORMAT else None
    if not isinstance(groups, dict) or not groups:
        raise wrong
    for name, group in groups.items():
        if not GROUP.fullmatch(name) or not isinstance(group, dict) or not _is_sha256(group.get("sha256")):
            raise wrong
        parts = group.get("parts")
        if not isinstance(parts, list) or not parts:
            raise wrong
        for number, part in enumerate(parts, 1):
            if (
                not isinstance(part, dict)
                or part.get("name") != part_name(name, number)
                or type(part.get("bytes")) is not int
                or part["bytes"] < 1
                or not _is_sha256(part.get("sha256"))
            ):
                raise wrong
    return groups


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def arrived(folders: Sequence[Path], groups: Groups) -> dict[str, Path]:
    """Return part name -> file, of the parts in ``folders``, each of which was checked.

    Raises:
        JoinError: a part is there twice, is not in the index, or is damaged.
    """
    known = {part["name"]: part for group in groups.values() for part in group["parts"]}
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.part")):
            if file.name not in known:
                raise JoinError(f"{file}: is not in {INDEX}; remove it, or copy the index that belongs to it")
            if file.name in found:
                raise JoinError(f"{file}: is also at {found[file.name]}; give each part once")
            check(file, known[file.name])
            found[file.name] = file
    return found


def check(file: Path, part: dict[str, Any]) -> None:
    """Compare a part with the index.

    Raises:
        JoinError: it is no plain file, or its size or sha256 differs.
    """
    if file.is_symlink() or not file.is_file():
        raise JoinError(f"{file}: is not a plain file; copy it again")
    size = file.stat().st_size
    if size != part["bytes"]:
        raise JoinError(f"{file}: has {size} bytes and not {part['bytes']}; copy it again")
    if sha256_of(file) != part["sha256"]:
        raise JoinError(f"{file}: is damaged, its sha256 is not the index's; copy it again")


class Chain(io.RawIOBase):
    """Several files, read as one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._stream: BinaryIO | None = None

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; 0 at the end of the last file."""
        while self._stream is not None or self._files:
            if self._stream is None:
                self._stream = self._files.pop(0).open("rb")
            data = self._stream.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._stream.close()
            self._stream = None
        return 0


def unpack(files: Sequence[Path], out: Path) -> None:
    """Unpack the tar archive that ``files`` are the parts of, below ``out`` and nowhere else.

    Raises:
        JoinError: it has a member that is no plain file below its folder, or is no archive.
    """
    base = out.resolve()
    try:
        with tarfile.open(fileobj=io.BufferedReader(Chain(files), BLOCK), mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg() or name.is_absolute() or ".." in name.parts or not name.parts:
                    raise JoinError(
                        f"{files[0].name}: holds {member.name[:80]!r}, no plain file of the bundle; pack again"
                    )
                path = out / name
                _make_parents(path, base)
                path.unlink(missing_ok=True)  # never through a link
                source = archive.extractfile(member)
                assert source is not None
                with source, path.open("xb") as target:
                    shutil.copyfileobj(source, target, BLOCK)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError):
        raise JoinError(f"{files[0].name}: its group is no archive; pack again") from None


def _make_parents(path: Path, base: Path) -> None:
    parent = path.parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.resolve().is_relative_to(base):
        raise JoinError(f"{path}: leads out of the bundle's folder by a link; give a new folder as --out")
    parent.mkdir(parents=True, exist_ok=True)


def join(folders: Sequence[Path], out: Path, wanted: Sequence[str] | None = None) -> list[str]:
    """Take what is in ``folders``, unpack the groups that are complete, and return the names of what is missing.

    Args:
        folders: folders with parts; the first index.json in them counts, and all must be the same.
        out: the bundle's folder.
        wanted: groups whose parts may not be missing; None for all of the index.

    Raises:
        JoinError: a part or the index is wrong; no file of ``out`` was changed.
    """
    indexes = [folder / INDEX for folder in folders if (folder / INDEX).is_file()]
    if not indexes:
        raise JoinError(f"{folders[0]}: has no {INDEX}; copy it beside the parts")
    groups = read_index(indexes[0])
    if any(read_index(other) != groups for other in indexes[1:]):
        raise JoinError(f"{indexes[1]}: differs from {indexes[0]}; give parts of one bundle")
    wanted = list(groups) if wanted is None else wanted
    if unknown := [name for name in wanted if name not in groups]:
        raise JoinError(f"--groups: no group {unknown[0][:40]!r}; one of {', '.join(groups)}")
    found = arrived(folders, groups)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise JoinError(f"{out}: is not a folder; give another --out")
    missing = []
    for name, group in groups.items():
        missing += _take(name, group, found, out=out, wanted=name in wanted)
    return missing


def _take(name: str, group: dict[str, Any], found: dict[str, Path], *, out: Path, wanted: bool) -> list[str]:
    """Keep the arrived parts of a group, or unpack it where it is complete; return the parts that are missing."""
    done = out / DONE / name
    if done.is_file() and done.read_text() == group["sha256"]:
        return []
    kept = out / KEPT
    for folder in (kept, out / DONE):
        if folder.is_symlink():
            raise JoinError(f"{folder}: is a link; give a new folder as --out")
        folder.mkdir(parents=True, exist_ok=True)
    files = [kept / part["name"] for part in group["parts"]]
    for file, part in zip(files, group["parts"], strict=True):
        _keep(file, part, found.get(part["name"]))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        return missing if wanted else []
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.read_bytes())
    if whole.hexdigest() != group["sha256"]:
        raise JoinError(f"group {name}: its parts do not make the whole that {INDEX} describes; pack again")
    unpack(files, out)
    done.write_text(group["sha256"])
    for file in files:
        file.unlink()
    return []


def _keep(file: Path, part: dict[str, Any], source: Path | None) -> None:
    """Copy a part that arrived to ``file``; remove what an interrupted copy or another bundle left there."""
    if source is not None:
        file.unlink(missing_ok=True)
        shutil.copyfile(source, file)
    if file.is_symlink() or file.exists():
        try:
            check(file, part)
        except JoinError:
            file.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when every wanted group is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+", help="folders with parts and index.json")
    parser.add_argument("--out", type=Path, default=Path("bundle"), help="the bundle's folder")
    parser.add_argument("--groups", help="groups that must be complete, separated by commas; default all")
    args = parser.parse_args(arguments)
    try:
        missing = join(args.parts, args.out, args.groups.split(",") if args.groups else None)
    except JoinError as error:
        print(f"join: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"join: {error.filename or args.out}: {error.strerror}; check space and permissions", file=sys.stderr)
        return 2
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        print(f"join: missing: {shown}; copy them and join again", file=sys.stderr)
        return 2
    print(f"joined: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
