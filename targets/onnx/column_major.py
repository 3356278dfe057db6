"""Integers stored column by column, [columns, rows], as MatMul takes its second operand behind a DequantizeLinear.

int4 is signed, two codes a byte, as ONNX packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.artifact.weight_file import BLOCK_BYTES, Columns
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedBlock, quantized_blocks
from h1export.targets.onnx.emit import Context, initializer_name

CODES = ".codes"
SCALES = ".scales"
ZEROS = ".zeros"

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]
Scales = Callable[[QuantizedTensor], npt.NDArray[Any]]  # the scales to store, [rows, groups]


def pack(codes: Codes) -> Bytes:
    """Pack signed int4, an even number in the last axis, with the first of a pair in the low nibble."""
    low = codes[..., 0::2].view(np.uint8) & np.uint8(15)
    high = codes[..., 1::2].view(np.uint8) << np.uint8(4)
    return low | high


def unpack(packed: Bytes) -> Codes:
    """Undo ``pack`` on one axis."""
    pairs = np.stack([packed << np.uint8(4), packed], axis=1).reshape(-1)
    return pairs.view(np.int8) >> np.int8(4)


def write_column_major(
    c: Context, expr: WeightExpr, precision: Precision, *, dtype: ir.DataType, scales_of: Scales
) -> list[ir.ExternalTensor]:
    """Write codes [columns, rows] of an expression along axis 0, scales [groups, rows] and any zero points.

    Scales have ``dtype``; they and zero points are [rows] where a row has one group. Where codes are int4, each of
    several parts has an even number of rows.
    """
    rows, columns = expr.shape(c.store.shape)
    name = initializer_name(expr)
    count = columns // precision.columns_per_group(columns)
    stored = ir.DataType.INT4 if precision.bits == 4 else ir.DataType.INT8
    groups = (count, rows) if precision.group_size else (rows,)
    places = [c.data.place(name + CODES, stored, (columns, rows)), c.data.place(name + SCALES, dtype, groups)]
    if precision.zeros:
        places.append(c.data.place(name + ZEROS, stored, groups))
    c.data.fill(
        places,
        (
            partial(_columns, precision.bits, scales_of, block, start=start)
            for start, block in _blocks(c, expr, precision)
        ),
    )
    return places


def _blocks(c: Context, expr: WeightExpr, precision: Precision) -> Iterator[tuple[int, QuantizedBlock]]:
    """Yield row blocks and the row that each starts at."""
    top = 0
    for part in expr.parts:
        rows = c.store.shape(part.tensor)[0]
        # columns of int4 have to end on bytes, and with an odd number of rows only the whole tensor does
        multiple = 1 if precision.bits == 8 else 2 if rows % 2 == 0 else rows
        ranges = c.store.row_ranges([part.tensor], BLOCK_BYTES, multiple)
        blocks = quantized_blocks(WeightExpr((part,)), c.store, c.integers, max_bytes=BLOCK_BYTES, multiple=multiple)
        yield from ((top + start, block) for (start, _), block in zip(ranges, blocks, strict=True))
        top += rows


def _columns(bits: int, scales_of: Scales, block: QuantizedBlock, *, start: int) -> tuple[Columns | Bytes, ...]:
    """Return codes, scales and zero points of rows from ``start`` on, as columns."""
    (tensor,) = block()
    stored = scales_of(tensor)
    codes = _integer_columns(bits, tensor.codes, start)
    scales = Columns(stored.T, start * stored.itemsize)
    return (codes, scales) if tensor.zeros is None else (codes, scales, _integer_columns(bits, tensor.zeros, start))


def _integer_columns(bits: int, rows: Codes, start: int) -> Columns | Bytes:
    if bits == 8:
        return Columns(rows.T, start)
    if len(rows) % 2:  # the whole tensor: pairs go on over the ends of rows
        return pack(rows.T.reshape(-1))
    return Columns(pack(rows.T), start // 2)


def read_column_major(packed: Any, bits: int, rows: int) -> Codes:
    """Return int8 [rows, n] of an array as stored; int4 is flat bytes."""
    columns: Codes = unpack(np.asarray(packed)) if bits == 4 else np.asarray(packed)
    return np.ascontiguousarray(columns.reshape(-1, rows).T)
