"""Keys and values in int8: what a row of them, those of one token for one head, is in memory.

A row of `columns` numbers is `columns` codes of -127 to 127 and then two bytes for the scale of each block of 32
columns: bits 15 to 30 of a positive float32, least significant byte first, so 8 bits of its mantissa and then its
exponent. The scale is the one nearest to a 127th of the block's largest magnitude, and a code the integer nearest to a
number divided by the scale, ties to even.

- The largest number of a block gets the code 127 or -127. So ``encode(decode(rows))`` is ``rows``, for rows that
  ``encode`` made: states that pass through float32 lose nothing.
- Scales below 2^-125 are 0, and their codes too: no number that is read is subnormal.
- A block with an infinity or NaN is NaN in every column.

csrc/cache_rows.h and emit/int8_cache.py compute the same bytes. The blocks are those of q8_0 in ggml's ggml-common.h;
its scales are float16, whose range is narrower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array

DOMAIN = "h1export.int8_rows"  # of the functions in a graph that encode and decode rows
BLOCK = 32
SCALE_BYTES = 2
TOP = 127  # the largest code
CUT = 15  # bits of a float32 that a scale does not have
LEAST = 2 << 8  # the bits of the smallest scale
NOT_A_NUMBER = 0xFF80  # the bits of the scale of a block with an infinity or NaN

Rows = npt.NDArray[np.int8]


def width(columns: int) -> int:
    """Return the bytes of a row of ``columns`` numbers, a multiple of BLOCK."""
    return columns + columns // BLOCK * SCALE_BYTES


def columns_of(width: int) -> int:
    """Return the numbers of a row of ``width`` bytes."""
    return width // (BLOCK + SCALE_BYTES) * BLOCK


def encode(numbers: Array) -> Rows:
    """Return rows int8 [..., width(columns)] of ``numbers`` float32 [..., columns]."""
    *outer, columns = numbers.shape
    blocks = numbers.reshape(*outer, columns // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    finite = np.isfinite(largest)
    bits = (largest / np.float32(TOP)).view(np.uint32) + np.uint32(1 << CUT >> 1) >> np.uint32(CUT)
    bits = np.where(finite, np.where(bits < LEAST, 0, bits), NOT_A_NUMBER).astype("<u2")
    used = finite & (bits > 0)
    scales = np.where(used, _scales(bits), np.float32(1))[..., None]
    codes = np.where(used[..., None], np.rint(np.where(used[..., None], blocks, 0) / scales), 0).astype(np.int8)
    halves = [codes.reshape(*outer, columns), bits.view(np.int8).reshape(*outer, columns // BLOCK * SCALE_BYTES)]
    return np.concatenate(halves, axis=-1)


def decode(rows: npt.NDArray[Any]) -> Array:
    """Return the numbers float32 [..., columns] of ``rows`` int8 [..., width(columns)]."""
    *outer, size = rows.shape
    columns = columns_of(size)
    codes = rows[..., :columns].reshape(*outer, columns // BLOCK, BLOCK).astype(np.float32)
    bits = np.ascontiguousarray(rows[..., columns:]).view("<u2")
    return np.asarray(codes * _scales(bits)[..., None], np.float32).reshape(*outer, columns)


def _scales(bits: npt.NDArray[Any]) -> Array:
    return (bits.astype(np.uint32) << np.uint32(CUT)).view(np.float32)
