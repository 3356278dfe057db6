"""weight.bin, the file of an ML program's weights.

A header of 64 bytes (count, version 2), then for each tensor a record of 64 bytes (sentinel, dtype, bytes, where its
data begins) and its data, both at multiples of 64. Source: MILBlob's StorageFormat.hpp; tests read our files with
coremltools' own reader.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import Block, WeightFile

RECORD = 64  # bytes of the header, of a record, and the alignment of everything
SENTINEL = 0xDEADBEEF
VERSION = 2


class BlobType(IntEnum):
    """MILBlob's codes of the dtypes that this target stores."""

    FLOAT16 = 1
    FLOAT32 = 2
    INT8 = 4
    INT4 = 8
    INT32 = 14

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor. Raises ValueError for half a byte."""
        bits = BITS[self] * prod(shape)
        if bits % 8:
            raise ValueError(f"{shape} of {self.name} are no whole bytes")
        return bits // 8


BITS = {BlobType.FLOAT16: 16, BlobType.FLOAT32: 32, BlobType.INT8: 8, BlobType.INT4: 4, BlobType.INT32: 32}
OF_ARRAY = {
    np.dtype(np.float16): BlobType.FLOAT16,
    np.dtype(np.float32): BlobType.FLOAT32,
    np.dtype(np.int32): BlobType.INT32,
}


def pack_int4(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack int8 [rows, columns] into uint8 [rows, columns / 2]: two's complement, even columns in the low nibbles."""
    unsigned = codes.view(np.uint8)
    return np.asarray((unsigned[:, 0::2] & 15) | (unsigned[:, 1::2] << np.uint8(4)))


class BlobStorage(WeightFile):
    """A WeightFile in weight.bin's format, in which the offset of its record identifies a tensor."""

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__(stage, name)
        self._header = self.reserve("header", RECORD, RECORD)
        self._count = 0

    def add(self, tensors: Sequence[tuple[str, BlobType, tuple[int, ...]]], blocks: Iterable[Block]) -> list[int]:
        """Write tensors (name, dtype, shape), whose rows ``blocks`` compute from the top, and return their offsets."""
        sizes = [dtype.nbytes(shape) for _, dtype, shape in tensors]
        extents = [self.reserve(name, RECORD + size, RECORD) for (name, _, _), size in zip(tensors, sizes, strict=True)]
        records = [
            struct.pack("<IIQQQ32x", SENTINEL, dtype, size, extent.offset + RECORD, 0)
            for (_, dtype, _), size, extent in zip(tensors, sizes, extents, strict=True)
        ]
        self.write(extents, chain([_constant(*records)], blocks))
        self._count += len(tensors)
        return [extent.offset for extent in extents]

    def add_array(self, name: str, array: npt.NDArray[Any]) -> int:
        """Write one array and return its offset."""
        (offset,) = self.add([(name, OF_ARRAY[array.dtype], array.shape)], [lambda: (array,)])
        return offset

    def finish(self) -> None:
        """Write the header, once all tensors are there."""
        self.write([self._header], [_constant(struct.pack("<II56x", self._count, VERSION))])


def _constant(*data: bytes) -> Callable[[], Sequence[npt.NDArray[np.uint8]]]:
    return lambda: [np.frombuffer(part, np.uint8) for part in data]
