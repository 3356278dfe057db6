"""The layout of com.microsoft's MatMulNBits: unsigned codes in whole blocks of columns, zero points beside them.

Codes are stored unsigned: the zero point is 8 or 128, the operator's default, where a tensor has none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from h1export.quantize.precision import Precision

# int8 repeats a scale for each of MatMulNBits' blocks, which are small because level 4 rounds activations by block
INT8_BLOCKS = (32, 16)

Codes = npt.NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class NBitsLayout:
    """How MatMulNBits stores [rows, columns]: whole blocks, the last one padded with zero points.

    Attributes:
        bits: bits of a code, 4 or 8.
        block_size: columns of a block, which share a scale.
        columns: columns of the matrix.
    """

    bits: int
    block_size: int
    columns: int

    @classmethod
    def of(cls, precision: Precision, columns: int) -> NBitsLayout:
        """Return the layout of a matrix with ``columns``; int8 takes the largest block that divides them."""
        whole = (size for size in INT8_BLOCKS if columns % size == 0)
        return cls(precision.bits, precision.group_size or next(whole, INT8_BLOCKS[-1]), columns)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.columns // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.block_size * self.bits // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.blocks * self.block_bytes

    @property
    def zero_bytes(self) -> int:
        """Bytes of a row's zero points."""
        return -(-self.blocks * self.bits // 8)

    @property
    def zero_point(self) -> int:
        """The unsigned code that stands for 0."""
        return 1 << (self.bits - 1)

    def pack(self, codes: npt.NDArray[np.int8]) -> Codes:
        """Pack int8 [rows, columns] into uint8 [rows, blocks, block bytes]; int4 puts even columns into low nibbles."""
        unsigned = np.full((len(codes), self.blocks * self.block_size), self.zero_point, np.uint8)
        unsigned[:, : self.columns] = codes.view(np.uint8) + np.uint8(self.zero_point)  # wraps like two's complement
        if self.bits == 4:
            unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
        return unsigned.reshape(len(codes), self.blocks, self.block_bytes)

    def unpack(self, packed: Codes) -> npt.NDArray[np.int8]:
        """Undo ``pack``."""
        flat: Codes = packed.reshape(len(packed), -1)
        if self.bits == 4:
            flat = np.stack([flat & 15, flat >> 4], axis=2).reshape(len(flat), -1)
        return (flat[:, : self.columns] - np.uint8(self.zero_point)).view(np.int8)

    def pack_zeros(self, zeros: npt.NDArray[np.int8]) -> Codes:
        """Pack int8 [rows, blocks] into uint8 [rows, zero bytes]; int4 puts even blocks into low nibbles."""
        unsigned = np.zeros((len(zeros), self.zero_bytes * 8 // self.bits), np.uint8)
        unsigned[:, : self.blocks] = zeros.view(np.uint8) + np.uint8(self.zero_point)
        return unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4)) if self.bits == 4 else unsigned

    def unpack_zeros(self, packed: Codes) -> npt.NDArray[np.int8]:
        """Undo ``pack_zeros``."""
        flat = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1) if self.bits == 4 else packed
        return np.ascontiguousarray(flat[:, : self.blocks] - np.uint8(self.zero_point)).view(np.int8)

    def per_block(self, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Return scales or zero points as [rows, blocks]; one for a whole row is repeated for each of its blocks."""
        return np.broadcast_to(values, (len(values), self.blocks)) if values.shape[1] == 1 else values
