"""Integers for DequantizeLinear and MatMul, stored [columns, rows] as MatMul takes its second operand.

int4 is signed, two codes a byte, as ONNX packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.core.quant import Precision, QuantizedBlock, QuantizedTensor, quantized_blocks
from h1export.core.weights import WeightExpr
from h1export.targets.onnx.emit import Context, initializer_name
from h1export.targets.weightfile import BLOCK_BYTES, Columns

CODES, SCALES = ".codes", ".scales"

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]
Scales = Callable[[QuantizedTensor], npt.NDArray[Any]]  # those to store, [rows, blocks]


def pack(codes: Codes) -> Bytes:
    """Signed int4, an even number in the last axis, the first of a pair in the low nibble."""
    low, high = codes[..., 0::2].view(np.uint8) & np.uint8(15), codes[..., 1::2].view(np.uint8) << np.uint8(4)
    return low | high


def unpack(packed: Bytes) -> Codes:
    """The inverse of ``pack`` on one axis."""
    pairs = np.stack([packed << np.uint8(4), packed], axis=1).reshape(-1)
    return pairs.view(np.int8) >> np.int8(4)


def write_columns(
    c: Context, expr: WeightExpr, precision: Precision, dtype: ir.DataType, scales_of: Scales
) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
    """Write codes [columns, rows] of an expression along axis 0, and scales [blocks, rows] of ``dtype``; [rows] with one a row.

    Of several parts, each has an even number of rows where codes are int4.
    """
    rows, columns = expr.shape(c.store.shape)
    name, blocks = initializer_name(expr), columns // precision.columns_per_scale(columns)
    codes = c.data.place(name + CODES, ir.DataType.INT4 if precision.bits == 4 else ir.DataType.INT8, (columns, rows))
    scales = c.data.place(name + SCALES, dtype, (blocks, rows) if precision.block else (rows,))
    placed = (partial(_columns, precision, scales_of, block, start) for start, block in _blocks(c, expr, precision))
    c.data.fill([codes, scales], placed)
    return codes, scales


def _blocks(c: Context, expr: WeightExpr, precision: Precision) -> Iterator[tuple[int, QuantizedBlock]]:
    """Row blocks and the row that each starts at."""
    top = 0
    for part in expr.parts:
        rows = c.store.shape(part.tensor)[0]
        # columns of int4 have to end on bytes, and with an odd number of rows only the whole tensor does
        multiple = 1 if precision.bits == 8 else 2 if rows % 2 == 0 else rows
        ranges = c.store.row_ranges([part.tensor], BLOCK_BYTES, multiple)
        blocks = quantized_blocks(WeightExpr((part,)), c.store, c.integers, BLOCK_BYTES, multiple)
        yield from ((top + start, block) for (start, _), block in zip(ranges, blocks, strict=True))
        top += rows


def _columns(precision: Precision, scales_of: Scales, block: QuantizedBlock, start: int) -> tuple[Columns | Bytes, Columns]:
    """Codes and scales of rows from ``start`` on, as columns."""
    (tensor,) = block()
    stored = scales_of(tensor)
    codes, scales = tensor.codes.T, Columns(stored.T, start * stored.itemsize)
    if precision.bits == 8:
        return Columns(codes, start), scales
    if len(tensor.codes) % 2:  # the whole tensor: pairs go on over the ends of rows
        return pack(codes.reshape(-1)), scales
    return Columns(pack(codes), start // 2), scales


def read_columns(packed: Any, bits: int, columns: int, rows: int) -> Codes:
    """The codes [rows, columns] of an array as stored; int4 as flat bytes."""
    codes = np.asarray(packed)
    return np.ascontiguousarray((unpack(codes).reshape(columns, rows) if bits == 4 else codes).T)
