"""Integers stored column by column, [columns, rows], as MatMul takes its second operand behind a DequantizeLinear.

int4 is signed, two codes a byte, as ONNX packs them. column_major_writer.py writes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

CODES = ".codes"
SCALES = ".scales"
ZEROS = ".zeros"

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]


def pack(codes: Codes) -> Bytes:
    """Pack signed int4, an even number in the last axis, with the first of a pair in the low nibble."""
    low = codes[..., 0::2].view(np.uint8) & np.uint8(15)
    high = codes[..., 1::2].view(np.uint8) << np.uint8(4)
    return low | high


def unpack(packed: Bytes) -> Codes:
    """Undo ``pack`` on one axis."""
    pairs = np.stack([packed << np.uint8(4), packed], axis=1).reshape(-1)
    return pairs.view(np.int8) >> np.int8(4)


def read_column_major(packed: Any, bits: int, rows: int) -> Codes:
    """Return int8 [rows, n] of an array as stored; int4 is flat bytes."""
    columns: Codes = unpack(np.asarray(packed)) if bits == 4 else np.asarray(packed)
    return np.ascontiguousarray(columns.reshape(-1, rows).T)
