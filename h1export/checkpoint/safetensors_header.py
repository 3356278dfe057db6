"""Reads and checks the header of a safetensors file.

Source: the safetensors format specification. A file is a little-endian u64 header size, a JSON header of at most 100
MB, of which we read less, and the data. Offsets are relative to the data, and tensors neither overlap nor leave holes.
The safetensors library checks the same rules; they are checked here so that an error names the tensor, the byte and the
next step.
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError, reason
from h1export.forms import without_duplicates
from h1export.model.config_reader import shown
from h1export.model.falcon_h1.states import Array

MAX_HEADER_BYTES = 4 << 20  # 50,000 tensors; the largest published checkpoint has some thousand
FLOATS = ("F32", "F16", "BF16")
# The dtypes of Falcon-H1 checkpoints -> the dtype that numpy reads them with. numpy has no bf16, so its bits are read.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),  # of no checkpoint that is read, but of folders for MLX
}
OPAQUE = "bytes"  # stands for the dtype of a tensor that nothing reads, whatever it is
LFS_POINTER = b"version "  # the first bytes of a Git LFS pointer file
DOWNLOAD_AGAIN = "the file is damaged, download it again"
WRITTEN = "let nothing write to the checkpoint, and run the command again"
ALL = slice(None)
BLOCK = 1 << 24  # bytes that are read at a time where a whole tensor is


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor in a safetensors file.

    Attributes:
        file: the file.
        name: name of the tensor.
        dtype: dtype in the format's spelling, a key of DTYPES.
        shape: shape of the tensor.
        start: first byte, counted from the beginning of the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return prod(self.shape) * (1 if self.dtype == OPAQUE else DTYPES[self.dtype].itemsize)

    def values(self, rows: slice = ALL, columns: slice = ALL) -> npt.NDArray[Any]:
        """Read the tensor, or rows of it, or columns of rows of a matrix, in its stored dtype; bf16 is given as uint16.

        The file is read and never mapped: where it is cut meanwhile, a page that is gone would kill the process.

        Raises:
            H1ExportError: the file cannot be read, or has become shorter.
        """
        dtype = DTYPES[self.dtype]
        height, width = (*self.shape, 1, 1)[:2]
        first, last, _ = rows.indices(height)
        left, right, _ = columns.indices(width)
        rest = self.shape[2:]
        line = width * prod(rest)
        shape = (max(0, last - first), line if columns is ALL else max(0, right - left))
        found = np.empty(shape, dtype)
        start = self.start + first * line * dtype.itemsize
        if columns is ALL:
            self._read([(start, found.reshape(-1))])
            return found.reshape((shape[0], *self.shape[1:]) if self.shape else ())
        self._read((start + (row * line + left) * dtype.itemsize, found[row]) for row in range(shape[0]))
        return found

    def blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the tensor's bytes as stored, at most ``BLOCK`` at a time; raise H1ExportError like ``values``."""
        for start in range(0, self.nbytes, BLOCK):
            block = np.empty(min(BLOCK, self.nbytes - start), np.uint8)
            self._read([(self.start + start, block)])
            yield block

    def _read(self, places: Iterable[tuple[int, npt.NDArray[Any]]]) -> None:
        """Fill arrays from where they begin in the file."""
        try:
            with open(self.file, "rb", buffering=0) as stream:
                for start, array in places:
                    left = array.data.cast("B") if array.size else memoryview(b"")
                    stream.seek(start)
                    while left:
                        count = stream.readinto(left)
                        if not count:
                            raise H1ExportError(self.file, "became shorter while it was read", WRITTEN)
                        left = left[count:]
        except OSError as error:
            raise H1ExportError(self.file, f"cannot be read ({error.strerror})", WRITTEN) from None

    def floats(self, rows: slice = ALL, columns: slice = ALL) -> Array:
        """Return the same part as ``values``, as float32.

        The conversion is exact for every dtype in FLOATS, the only dtypes that are allowed here.
        """
        stored = self.values(rows, columns)
        return (stored.astype(np.uint32) << 16).view(np.float32) if self.dtype == "BF16" else stored.astype(np.float32)


def read_header(file: Path, unread: Callable[[str], bool] = lambda name: False) -> list[TensorEntry]:
    """Return the entry of every tensor of ``file``, sorted by offset.

    Tensors of names that are ``unread`` may have any dtype; their entries are of bytes.

    Raises:
        H1ExportError: the file is not a safetensors file, is truncated, or has a header that breaks the format's rules.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise H1ExportError(file, "not a regular file", "give a checkpoint folder in Hugging Face layout")
        size = found.st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 0:
                raise H1ExportError(file, f"{size} bytes are too few for a safetensors file", DOWNLOAD_AGAIN)
            if prefix == LFS_POINTER:
                raise H1ExportError(file, "a Git LFS pointer, not the file itself", "run git lfs pull")
            if length > MAX_HEADER_BYTES:
                what = f"header of {length} bytes, and at most {MAX_HEADER_BYTES} are read"
                raise H1ExportError(file, what, "the file is damaged or not a safetensors file")
            if 8 + length > size:
                raise H1ExportError(
                    file, f"header ends at byte {8 + length} of {size}", "the file is truncated, download it again"
                )
            text = stream.read(length)
    except OSError as error:
        raise H1ExportError(file, f"cannot be read ({error.strerror})", "check the path and its permissions") from None
    entries = _parse(file, text, 8 + length, unread=unread)
    _check_ranges(file, entries, 8 + length, size=size)
    return entries


def _parse(file: Path, text: bytes, base: int, *, unread: Callable[[str], bool]) -> list[TensorEntry]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise H1ExportError(file, f"header is not valid JSON ({reason(error)})", DOWNLOAD_AGAIN) from None
    if not isinstance(header, dict):
        raise H1ExportError(file, "header is not a JSON object", DOWNLOAD_AGAIN)
    header.pop("__metadata__", None)
    return sorted(
        (_entry(file, name, info, base=base, any_dtype=unread(name)) for name, info in header.items()),
        key=lambda entry: (entry.start, entry.nbytes),
    )


def _entry(file: Path, name: str, info: Any, *, base: int, any_dtype: bool) -> TensorEntry:
    where = f'{file}: tensor "{name}"'
    if not isinstance(info, dict):
        raise H1ExportError(where, "has no description", DOWNLOAD_AGAIN)
    dtype = info.get("dtype")
    if any_dtype and (not isinstance(dtype, str) or dtype not in FLOATS):
        start, end = (*_counts(info.get("data_offsets"), f"{where} has data_offsets"), 0, 0)[:2]
        return TensorEntry(file, name, OPAQUE, shape=(max(0, end - start),), start=base + start)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise H1ExportError(where, f"has dtype {shown(dtype)}", f"only {', '.join(FLOATS)} checkpoints can be exported")
    shape = _counts(info.get("shape"), f"{where} has shape")
    offsets = _counts(info.get("data_offsets"), f"{where} has data_offsets")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * DTYPES[dtype].itemsize:
        what = f"of shape {shape} and dtype {dtype} cannot be stored at data_offsets {offsets}"
        raise H1ExportError(where, what, DOWNLOAD_AGAIN)
    return TensorEntry(file, name, dtype, shape=tuple(shape), start=base + offsets[0])


def _counts(value: Any, where: str) -> list[int]:
    """Return ``value`` if it is a short list of 64-bit counts; the product of a long hostile list takes too long."""
    fits = (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )
    if not fits:
        raise H1ExportError(f"{where} {value!r:.80}", "not a list of at most 8 counts", DOWNLOAD_AGAIN)
    return list(value)


def _check_ranges(file: Path, entries: list[TensorEntry], base: int, *, size: int) -> None:
    end = base
    before = "the header"
    for entry in entries:
        where = f'{file}: tensor "{entry.name}"'
        if entry.start < end:
            raise H1ExportError(where, f"starts at byte {entry.start}, inside {before}", DOWNLOAD_AGAIN)
        if entry.start > end:
            raise H1ExportError(
                where, f"starts at byte {entry.start}, {entry.start - end} bytes after {before}", DOWNLOAD_AGAIN
            )
        end = entry.start + entry.nbytes
        before = f'tensor "{entry.name}"'
        if end > size:
            raise H1ExportError(where, f"ends at byte {end} of {size}", "the file is truncated, download it again")
    if end != size:
        raise H1ExportError(file, f"has {size - end} bytes after the last tensor", DOWNLOAD_AGAIN)
