"""Reader of weight.bin, written against the file format alone.

The file is a 64-byte header (u32 records, u32 version), then records: 64 bytes of metadata at a multiple of 64 (u32 sentinel, u32 type,
u64 bytes, u64 offset of the data, u64 unused bits at its end), and the data at a multiple of 64. Numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.dtypes import BY_BLOB, Array, DType, decode

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
AGAIN = "copy the package again, or build it again"


@dataclass(frozen=True)
class Record:
    """One tensor's bytes: ``padding`` counts the bits at the end that hold no element."""

    offset: int  # of the metadata: what a program refers to
    dtype: DType
    nbytes: int
    start: int
    padding: int

    @property
    def count(self) -> int:
        """Elements."""
        return (self.nbytes * 8 - self.padding) // self.dtype.bits


class BlobFile:
    """A memory-mapped weight.bin.

    Raises:
        H1ExportError: missing, unreadable, shorter than its header, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < ALIGNMENT:
                raise H1ExportError(
                    path, f"has {size} bytes, less than its header of {ALIGNMENT}; the file is truncated", AGAIN
                )
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise H1ExportError(path, f"cannot be read ({error.strerror})", AGAIN) from error
        self.count, version = struct.unpack("<II", self._bytes[:8].tobytes())
        if version != VERSION:
            raise H1ExportError(path, f"is of format version {version}, not {VERSION}", AGAIN)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return int(self._bytes.size)

    def record(self, offset: int) -> Record:
        """The metadata at ``offset``, every bound checked.

        Raises:
            H1ExportError: misaligned, outside the file, no sentinel, an unknown type, or data outside the file.
        """
        where = f"{self.path} at byte {offset}"
        if offset % ALIGNMENT or offset < ALIGNMENT:
            raise H1ExportError(
                where, f"is no place for metadata, which lies at multiples of {ALIGNMENT} after the header", AGAIN
            )
        if offset + ALIGNMENT > self.nbytes:
            raise H1ExportError(
                where, f"metadata ends at byte {offset + ALIGNMENT} of {self.nbytes}; the file is truncated", AGAIN
            )
        sentinel, code, nbytes, start, padding = struct.unpack("<IIQQQ", self._bytes[offset : offset + 32].tobytes())
        if sentinel != SENTINEL:
            raise H1ExportError(where, f"metadata starts with {sentinel:#x} instead of {SENTINEL:#x}", AGAIN)
        if code not in BY_BLOB:
            raise H1ExportError(
                where, f"holds elements of type {code}, which is not known here", "store the tensor in another type"
            )
        if start % ALIGNMENT or start < offset + ALIGNMENT:
            raise H1ExportError(where, f"data at byte {start} is misaligned or before its metadata", AGAIN)
        if start + nbytes > self.nbytes:
            raise H1ExportError(
                where, f"data ends at byte {start + nbytes} of {self.nbytes}; the file is truncated", AGAIN
            )
        dtype = BY_BLOB[code]
        if padding >= 8 or (nbytes * 8 - padding) % dtype.bits:
            what = f"{nbytes} bytes less {padding} bits are no whole number of {dtype}"
            raise H1ExportError(where, what, AGAIN)
        return Record(offset, dtype, nbytes, start=start, padding=padding)

    def records(self) -> Iterator[Record]:
        """All records in the order of the file, each where the data before it ends, rounded up.

        Raises:
            H1ExportError: see ``record``.
        """
        offset = ALIGNMENT
        for _ in range(self.count):
            found = self.record(offset)
            yield found
            offset = -(-(found.start + found.nbytes) // ALIGNMENT) * ALIGNMENT

    def read(self, offset: int, dtype: DType, count: int) -> Array:
        """``count`` elements, flat: a read-only view of the file, or a new array where elements share bytes.

        Raises:
            H1ExportError: see ``record``; another type or number of elements than stored.
        """
        record = self.record(offset)
        where = f"{self.path} at byte {offset}"
        if record.dtype != dtype:
            raise H1ExportError(where, f"holds {record.dtype}, and the program asks for {dtype}", AGAIN)
        if record.count != count:
            raise H1ExportError(where, f"holds {record.count} elements, and the program asks for {count}", AGAIN)
        return decode(self._bytes[record.start : record.start + record.nbytes], dtype, count)
