"""Precision: the integers that a tensor is stored in, and the bits that they take."""

from __future__ import annotations

from dataclasses import dataclass

SCALE_BITS = 16  # a scale is fp16


@dataclass(frozen=True)
class Precision:
    """The format of a matrix in integers.

    Attributes:
        bits: bits of a code, 4 or 8.
        group_size: columns that share a scale; 0: one scale per row.
        zeros: whether every group has a zero point too.
    """

    bits: int
    group_size: int
    zeros: bool = False

    @property
    def top(self) -> int:
        """The largest code that rounding gives; the smallest is its negative."""
        return (1 << (self.bits - 1)) - 1

    def columns_per_group(self, columns: int) -> int:
        """Returns the columns that share a scale in a matrix of ``columns`` columns."""
        return self.group_size or columns

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Returns the bits of the codes and scales of a matrix [rows, columns]; zero points are not counted.

        Some runtimes repeat a row's scale or pad a row, which is not counted either.
        """
        rows, columns = shape
        groups = -(-columns // self.columns_per_group(columns))
        return rows * (columns * self.bits + groups * SCALE_BITS)


INT8 = Precision(8, 0)
