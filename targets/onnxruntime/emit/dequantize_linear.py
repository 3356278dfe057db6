"""Integers for DequantizeLinear, stored [columns, rows], as MatMul takes its second operand.

ONNX Runtime turns DequantizeLinear and MatMul over this layout into MatMulNBits; over [rows, columns] it dequantises
the whole weight in every call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedBlock, quantized_blocks
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.column_major import SCALES
from h1export.targets.onnx.column_major_writer import write_column_major
from h1export.targets.onnx.emit import Context, initializer_name
from h1export.targets.onnxruntime.emit.packing import NBitsLayout
from h1export.targets.onnxruntime.read_back import TABLE


def folded_scales(tensor: QuantizedTensor) -> Array:
    """Return fp16 scales times the multiplier, float32 [rows, groups]."""
    return tensor.scales.astype(np.float32) * tensor.row_scale[:, None]


def dequantized(c: Context, expr: WeightExpr, precision: Precision) -> Value:
    """Emit the weight [columns, rows] in float32, as a node over its integers."""
    operands = c.build.once((expr, precision), lambda: _write(c, expr, precision))
    blocks: dict[str, Any] = {"axis": 0, "block_size": precision.group_size} if precision.group_size else {"axis": 1}
    return c.build.op("DequantizeLinear", *operands, **blocks)


def _write(c: Context, expr: WeightExpr, precision: Precision) -> list[Value]:
    """Write codes, scales, and zero points where there are some."""
    places = write_column_major(c, expr, precision, dtype=ir.DataType.FLOAT, scales_of=folded_scales)
    c.note_stored(expr, precision)
    return [c.build.initializer(place) for place in places]


def _rows(layout: NBitsLayout, block: QuantizedBlock) -> tuple[npt.NDArray[Any], Array]:
    (tensor,) = block()
    return layout.pack(tensor.codes) if layout.bits == 4 else tensor.codes, folded_scales(tensor)


def embed(c: Context, ids: Value, expr: WeightExpr, *, precision: Precision) -> Value:
    """Emit rows ``ids`` of the embedding in float32.

    Integers that a tied head reads too are noted for the manifest by the head.
    """
    rows, columns = c.store.shape(expr.only.tensor)
    name = initializer_name(expr) + TABLE
    b = c.build
    layout = NBitsLayout(precision.bits, precision.group_size or columns, columns)
    stored = ir.DataType.UINT8 if precision.bits == 4 else ir.DataType.INT8
    codes = c.data.place(name, stored, (rows, columns * precision.bits // 8))
    scales = c.data.place(name + SCALES, ir.DataType.FLOAT, (rows, layout.blocks))
    c.data.fill(
        [codes, scales],
        (partial(_rows, layout, block) for block in quantized_blocks(expr, c.store, c.integers, max_bytes=BLOCK_BYTES)),
    )
    if not c.is_multiplied(expr.only.tensor):
        c.note_stored(expr, precision)
    found = b.op("Cast", b.op("Gather", b.initializer(codes), ids), to=1)
    scale = b.op("Gather", b.initializer(scales), ids)
    if precision.bits == 8:
        return b.op("Mul", found, scale)
    high = b.op("Floor", b.op("Div", found, b.constant(16, np.float32)))
    low = b.op("Sub", found, b.op("Mul", high, b.constant(16, np.float32)))
    pairs = b.op("Concat", b.op("Unsqueeze", low, b.ints(3)), b.op("Unsqueeze", high, b.ints(3)), axis=3)
    signed = b.op(
        "Sub",
        b.op("Reshape", pairs, b.ints(0, 0, layout.blocks, layout.block_size)),
        b.constant(layout.zero_point, np.float32),
    )
    return b.op("Reshape", b.op("Mul", signed, b.op("Unsqueeze", scale, b.ints(3))), b.ints(0, 0, columns))
