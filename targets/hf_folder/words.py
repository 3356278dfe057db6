"""Codes packed into 32-bit words, the first in the lowest bits, as GPTQ and MLX store them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int8]
Words = npt.NDArray[np.uint32]


def packed(codes: Codes, bits: int) -> Words:
    """Pack signed codes [n, m] of 4 or 8 bits along the second axis, moved to start at 0, uint32 [n, m * bits / 32]."""
    moved = np.ascontiguousarray(codes).view(np.uint8) + np.uint8(1 << (bits - 1))
    if bits == 4:
        moved = (moved[:, 0::2] & np.uint8(15)) | (moved[:, 1::2] << np.uint8(4))
    words: Words = np.ascontiguousarray(moved).view("<u4")
    return words


def unpacked(words: Words, bits: int) -> Codes:
    """Undo ``packed``."""
    codes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=2).reshape(len(codes), -1)
    return (codes - np.uint8(1 << (bits - 1))).view(np.int8)
