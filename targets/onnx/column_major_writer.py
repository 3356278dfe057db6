"""Write integers column by column into the external data; column_major.py has the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from h1export.artifact.weight_file import BLOCK_BYTES, Columns
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedBlock, quantized_blocks
from h1export.targets.onnx.column_major import CODES, SCALES, ZEROS, Bytes, Codes, pack
from h1export.targets.onnx.emit import Context, initializer_name

ScalesOf = Callable[[QuantizedTensor], npt.NDArray[Any]]  # gives the scales to store, [rows, groups]


def write_column_major(
    c: Context, expr: WeightExpr, precision: Precision, *, dtype: ir.DataType, scales_of: ScalesOf
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
    """Yield the row that each block starts at, and the block."""
    top = 0
    for part in expr.parts:
        rows = c.store.shape(part.tensor)[0]
        # columns of int4 have to end on bytes, and with an odd number of rows only the whole tensor does
        multiple = 1 if precision.bits == 8 else 2 if rows % 2 == 0 else rows
        ranges = c.store.row_ranges([part.tensor], BLOCK_BYTES, multiple)
        blocks = quantized_blocks(WeightExpr((part,)), c.store, c.integers, max_bytes=BLOCK_BYTES, multiple=multiple)
        yield from ((top + start, block) for (start, _), block in zip(ranges, blocks, strict=True))
        top += rows


def _columns(bits: int, scales_of: ScalesOf, block: QuantizedBlock, *, start: int) -> tuple[Columns | Bytes, ...]:
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
