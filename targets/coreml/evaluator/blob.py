"""The reader of weight.bin, written from the file format alone (StorageFormat.hpp of MILBlob in coremltools).

A file has a 64-byte header (u32 number of records, u32 version) and records. A record is 64 bytes of metadata (u32
sentinel, u32 type, u64 bytes of data, u64 offset of the data, u64 unused bits at the end of the data) and its data;
both start at multiples of 64. Numbers are little-endian.
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
COPY_AGAIN = "copy the package again, or build it again"


@dataclass(frozen=True)
class Record:
    """The metadata of one tensor.

    Attributes:
        offset: the byte offset of the metadata, which programs refer to.
        dtype: the element type.
        nbytes: the bytes of the data.
        start: the byte offset of the data.
        padding: the bits at the end of the data that hold no element.
    """

    offset: int
    dtype: DType
    nbytes: int
    start: int
    padding: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return (self.nbytes * 8 - self.padding) // self.dtype.bits


class BlobFile:
    """A memory-mapped weight.bin.

    Raises:
        H1ExportError: the file is missing, unreadable, shorter than its header, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < ALIGNMENT:
                raise H1ExportError(
                    path, f"has {size} bytes, less than its header of {ALIGNMENT}; the file is truncated", COPY_AGAIN
                )
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise H1ExportError(path, f"cannot be read ({error.strerror})", COPY_AGAIN) from error
        self.count, version = struct.unpack("<II", self._bytes[:8].tobytes())
        if version != VERSION:
            raise H1ExportError(path, f"is of format version {version}, not {VERSION}", COPY_AGAIN)

    @property
    def nbytes(self) -> int:
        """The size of the file in bytes."""
        return int(self._bytes.size)

    def record(self, offset: int) -> Record:
        """Read and check the metadata at ``offset``.

        Raises:
            H1ExportError: the metadata is misaligned, outside the file, without its sentinel or of an unknown type, or
                its data are misaligned or outside the file.
        """
        where = f"{self.path} at byte {offset}"
        if offset % ALIGNMENT or offset < ALIGNMENT:
            raise H1ExportError(
                where,
                f"is not a valid offset of metadata, which is stored at multiples of {ALIGNMENT} after the header",
                COPY_AGAIN,
            )
        if offset + ALIGNMENT > self.nbytes:
            raise H1ExportError(
                where, f"metadata ends at byte {offset + ALIGNMENT} of {self.nbytes}; the file is truncated", COPY_AGAIN
            )
        sentinel, code, nbytes, start, padding = struct.unpack("<IIQQQ", self._bytes[offset : offset + 32].tobytes())
        if sentinel != SENTINEL:
            raise H1ExportError(where, f"metadata starts with {sentinel:#x} instead of {SENTINEL:#x}", COPY_AGAIN)
        if code not in BY_BLOB:
            raise H1ExportError(
                where, f"holds elements of type {code}, which is unknown", "store the tensor in another type"
            )
        if start % ALIGNMENT or start < offset + ALIGNMENT:
            raise H1ExportError(where, f"data at byte {start} is misaligned or before its metadata", COPY_AGAIN)
        if start + nbytes > self.nbytes:
            raise H1ExportError(
                where, f"data ends at byte {start + nbytes} of {self.nbytes}; the file is truncated", COPY_AGAIN
            )
        dtype = BY_BLOB[code]
        if padding >= 8 or (nbytes * 8 - padding) % dtype.bits:
            what = f"{nbytes} bytes without {padding} bits are not a whole number of {dtype} elements"
            raise H1ExportError(where, what, COPY_AGAIN)
        return Record(offset, dtype, nbytes, start=start, padding=padding)

    def records(self) -> Iterator[Record]:
        """Yield all records in the order of the file; each starts at the next multiple of 64 after the data before it.

        Raises:
            H1ExportError: a record is damaged, see ``record``.
        """
        offset = ALIGNMENT
        for _ in range(self.count):
            found = self.record(offset)
            yield found
            offset = -(-(found.start + found.nbytes) // ALIGNMENT) * ALIGNMENT

    def read(self, offset: int, dtype: DType, count: int) -> Array:
        """Read ``count`` elements as a flat array.

        The array is a read-only view of the file, or a new array if elements share bytes.

        Raises:
            H1ExportError: the record is damaged (see ``record``), or stores another type or number of elements.
        """
        record = self.record(offset)
        where = f"{self.path} at byte {offset}"
        if record.dtype != dtype:
            raise H1ExportError(where, f"holds {record.dtype}, and the program expects {dtype}", COPY_AGAIN)
        if record.count != count:
            raise H1ExportError(where, f"holds {record.count} elements, and the program expects {count}", COPY_AGAIN)
        return decode(self._bytes[record.start : record.start + record.nbytes], dtype, count)
