"""Precision: what integers a tensor is stored in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Integers of ``bits`` with one scale per ``block`` columns; block 0: one scale per row. ``zeros``: and with as many zero points."""

    bits: int
    group_size: int
    zeros: bool = False

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative."""
        return (1 << (self.bits - 1)) - 1

    def columns_per_group(self, columns: int) -> int:
        return self.group_size or columns


INT8 = Precision(8, 0)
