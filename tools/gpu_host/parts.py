"""Pack groups of files into parts that join.py joins; the same files always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from gpu_host.join import FORMAT, INDEX, part_name

Files = Mapping[str, Path]  # name in the bundle -> file


class PartWriter(io.RawIOBase):
    """A stream that is cut into files of at most ``limit`` bytes."""

    def __init__(self, folder: Path, group: str, limit: int) -> None:
        self._folder = folder
        self._group = group
        self._limit = limit
        self._whole = hashlib.sha256()
        self._part = bytearray()
        self._parts: list[dict[str, str | int]] = []

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Take all of ``data``."""
        self._whole.update(data)
        self._part += data
        while len(self._part) >= self._limit:
            self._flush_part()
        return len(data)

    def _flush_part(self) -> None:
        data = bytes(self._part[: self._limit])
        del self._part[: self._limit]
        name = part_name(self._group, len(self._parts) + 1)
        (self._folder / name).write_bytes(data)
        self._parts.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    def finish(self) -> dict[str, object]:
        """Write the last part, and return the group's entry of the index."""
        if self._part:
            self._flush_part()
        return {"sha256": self._whole.hexdigest(), "parts": self._parts}


def write_parts(groups: Mapping[str, Files], folder: Path, limit: int) -> dict[str, dict[str, object]]:
    """Write the parts of all groups and index.json into ``folder``, and return group -> its entry of the index.

    Args:
        groups: group -> its files.
        folder: an existing folder.
        limit: the largest part, in bytes.
    """
    index = {}
    for group, files in groups.items():
        writer = PartWriter(folder, group, limit)
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for name, path in sorted(files.items()):
                member = tarfile.TarInfo(name)  # no time and no owner: they are not the bundle's
                member.size = path.stat().st_size
                member.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                with path.open("rb") as stream:
                    archive.addfile(member, stream)
        index[group] = writer.finish()
    text = json.dumps({"format": FORMAT, "groups": index}, indent=1, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return index
