"""MatMulNBits over integers in the external data, and the embedding that may share their bytes with a tied head.

Scales are stored in float16, as QuantizedTensor has them: 32 int4 codes and their scale take 18 bytes. MatMulNBits
takes scales of its activations' dtype, so nodes cast them to float32 and multiply them by µP. ONNX Runtime computes
these nodes once, when a session is created. Scales for bf16 activations would lose 3 of their 11 significant bits:
there a product takes its activations in float32, and casts what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedBlock, quantized_blocks
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.column_major import CODES, SCALES, ZEROS
from h1export.targets.onnx.emit import Context, initializer_name
from h1export.targets.onnx.narrow import narrow_matrix
from h1export.targets.onnxruntime.emit.packing import NBitsLayout
from h1export.targets.onnxruntime.read_back import ROWS

MS = "com.microsoft"
FLOAT = int(ir.DataType.FLOAT)


class OrtContext(Context):
    """A Context of ONNX Runtime's graphs.

    Attributes:
        accuracy_level: the level at which products with integers compute: 0 in float32, 4 with activations rounded to
            int8.
        halves: whether the session may compute with float16, which some GPUs cannot in browsers.
        narrow_embedding: whether an embedding in floats is stored in float16.
        kept: the number of last positions that get logits, int64; None where the graph has no such input.
    """

    accuracy_level: int = 0
    halves: bool = True
    narrow_embedding: bool = False
    kept: Value | None = None

    def weight(self, expr: WeightExpr) -> Value:
        if not self.narrow_embedding or [part.tensor for part in expr.parts] != [EMBEDDING]:
            return super().weight(expr)
        return self.build.once((expr, "wide"), lambda: self.cast(self._halves(expr), ir.DataType.FLOAT))

    def embedded(self, ids: Value, expr: WeightExpr) -> Value:
        """Emit rows ``ids`` of an embedding in floats, in float32.

        Where no product reads it, rows in float16 become float32 once they are gathered: a session would hold the table
        in float32 otherwise.
        """
        if self.narrow_embedding and self.halves and not self.is_multiplied(EMBEDDING):
            return self.cast(self.build.op("Gather", self._halves(expr), ids), ir.DataType.FLOAT)
        return self.build.op("Gather", self.weight(expr), ids)

    def _halves(self, expr: WeightExpr) -> Value:
        return narrow_matrix(self, expr, ir.DataType.FLOAT16, next_step="leave out --embedding fp16")


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised weight in the external data.

    Attributes:
        layout: the layout of its rows.
        codes: uint8 [rows, blocks, block bytes].
        scales: float16 [rows, blocks].
        zeros: uint8 [rows, zero bytes]; None: the zero points are the operator's default.
    """

    layout: NBitsLayout
    codes: ir.ExternalTensor
    scales: ir.ExternalTensor
    zeros: ir.ExternalTensor | None

    def zero_points(self, c: Context) -> tuple[Value, ...]:
        """Return the zero points as the last operand of the ops that read the weight; empty: the default."""
        return () if self.zeros is None else (c.build.initializer(self.zeros),)


def write_quantized(c: Context, expr: WeightExpr, precision: Precision) -> QuantizedMatrix:
    """Write codes, scales and zero points of ``expr``, once, and note them for the manifest."""
    return c.data.once((expr, precision), lambda: _write(c, expr, precision))


def _write(c: Context, expr: WeightExpr, precision: Precision) -> QuantizedMatrix:
    rows, columns = expr.shape(c.store.shape)
    layout = NBitsLayout.of(precision, columns)
    name = initializer_name(expr)
    codes = c.data.place(name + CODES, ir.DataType.UINT8, (rows, layout.blocks, layout.block_bytes))
    scales = c.data.place(name + SCALES, ir.DataType.FLOAT16, (rows, layout.blocks))
    zeros = c.data.place(name + ZEROS, ir.DataType.UINT8, (rows, layout.zero_bytes)) if precision.zeros else None
    places = [codes, scales] if zeros is None else [codes, scales, zeros]
    blocks = quantized_blocks(expr, c.store, c.integers, max_bytes=BLOCK_BYTES)
    c.data.fill(places, (partial(_packed_block, layout, block) for block in blocks))
    c.note_stored(expr, precision)
    return QuantizedMatrix(layout, codes, scales, zeros=zeros)


def _packed_block(layout: NBitsLayout, block: QuantizedBlock) -> tuple[npt.NDArray[Any], ...]:
    """Return codes, scales and zero points of a block of rows as the file has them."""
    parts = [(replace(layout, columns=tensor.codes.shape[1]), tensor) for tensor in block()]
    codes = np.concatenate([part.pack(tensor.codes) for part, tensor in parts], axis=1)
    scales = np.concatenate([part.per_block(tensor.scales) for part, tensor in parts], axis=1)
    zeros = [part.per_block(tensor.zeros) for part, tensor in parts if tensor.zeros is not None]
    return (codes, scales, layout.pack_zeros(np.concatenate(zeros, axis=1))) if zeros else (codes, scales)


def matmul_nbits(c: OrtContext, x: Value, expr: WeightExpr, *, precision: Precision) -> Value:
    """Emit x [.., K] times the transpose of the quantised weight [N, K]; fp16 ``x`` leaves µP to the caller."""
    if c.activations is ml_dtypes.bfloat16:
        x = c.as_float32(x)  # bf16 cannot hold the scales
    matrix = write_quantized(c, expr, precision)
    scales = c.build.initializer(matrix.scales) if c.activations is np.float16 else float_scales(c, expr, matrix)
    operands = (c.build.initializer(matrix.codes), scales, *matrix.zero_points(c))
    y = c.build.op("MatMulNBits", x, *operands, domain=MS, **product_attributes(c, expr, matrix))
    return c.as_activation(y) if c.activations is ml_dtypes.bfloat16 else y


def product_attributes(c: OrtContext, expr: WeightExpr, matrix: QuantizedMatrix) -> dict[str, int]:
    """Return the attributes of MatMulNBits, which the products of h1export's own kernels have too."""
    (rows, columns) = expr.shape(c.store.shape)
    return {
        "K": columns,
        "N": rows,
        "bits": matrix.layout.bits,
        "block_size": matrix.layout.block_size,
        "accuracy_level": c.accuracy_level,
    }


def row_multipliers(c: Context, expr: WeightExpr) -> Value | None:
    """Return the µP multiplier of each row of an expression along axis 0, float32 [rows]; None where all are 1."""
    ones = all(part.multiplier == Multiplier() for part in expr.parts)
    return None if ones else c.row_multipliers(expr)


def float_scales(c: Context, expr: WeightExpr, matrix: QuantizedMatrix) -> Value:
    """Return scales times µP, float32 [rows, blocks], from constants alone."""
    return c.build.once((expr, "float scales"), lambda: _float_scales(c, expr, matrix))


def _float_scales(c: Context, expr: WeightExpr, matrix: QuantizedMatrix) -> Value:
    b = c.build
    scales = b.op("Cast", b.initializer(matrix.scales), to=FLOAT)
    if expr.axis == 1:
        blocks = [c.store.shape(part.tensor)[1] // matrix.layout.block_size for part in expr.parts]
        by_block = np.repeat([part.multiplier.factor for part in expr.parts], blocks)
        return b.op("Mul", scales, b.constant(by_block, np.float32))
    multipliers = row_multipliers(c, expr)
    return scales if multipliers is None else b.op("Mul", scales, b.op("Unsqueeze", multipliers, b.ints(1)))


def embed_quantized(c: OrtContext, ids: Value, expr: WeightExpr, *, precision: Precision) -> Value:
    """Emit rows ``ids`` of the quantised embedding in float32; a tied head reads the same bytes."""
    matrix = write_quantized(c, expr, precision)
    b = c.build
    assert not precision.zeros, "no checkpoint has integers for its embedding"
    if precision.bits == 4:
        return gather_block_quantized(c, ids, expr, matrix=matrix, scales=float_scales(c, expr, matrix))
    layout = matrix.layout
    gathered = b.op("Gather", embedding_table(c, expr, matrix), ids)
    signed = b.op("Sub", b.op("Cast", gathered, to=FLOAT), b.constant(layout.zero_point, np.float32))
    values = b.op("Slice", signed, b.ints(0), b.ints(layout.columns), b.ints(2))
    return b.op("Mul", values, _row_scales(c, ids, matrix))


def _row_scales(c: OrtContext, ids: Value, matrix: QuantizedMatrix) -> Value:
    """Return the scales [.., 1] of rows ``ids`` in float32: one a row, of which the file has a copy for each block."""
    b = c.build
    scales = b.initializer(matrix.scales)
    if c.halves:  # in float32 once they are gathered, or a session would hold them all in float32
        gathered = b.op("Slice", b.op("Gather", scales, ids), b.ints(0), b.ints(1), b.ints(2))
        return b.op("Cast", gathered, to=FLOAT)
    return b.op("Gather", b.op("Cast", b.op("Slice", scales, b.ints(0), b.ints(1), b.ints(1)), to=FLOAT), ids)


def gather_block_quantized(
    c: Context, ids: Value, expr: WeightExpr, *, matrix: QuantizedMatrix, scales: Value
) -> Value:
    """Emit rows ``ids`` of an embedding, whole blocks of them, in the dtype of ``scales``."""
    layout = matrix.layout
    attributes = {"bits": layout.bits, "block_size": layout.block_size, "gather_axis": 0, "quantize_axis": 1}
    table = embedding_table(c, expr, matrix)
    return c.build.op("GatherBlockQuantized", table, ids, scales, domain=MS, **attributes)


def embedding_table(c: Context, expr: WeightExpr, matrix: QuantizedMatrix) -> Value:
    """Return the codes of an embedding, one flat row a token: bytes that a tied head reads too."""
    assert expr.only.multiplier == Multiplier(), "an embedding is stored without a multiplier"
    flat = (expr.shape(c.store.shape)[0], matrix.layout.row_bytes)
    return c.build.initializer(c.data.alias(f"{matrix.codes.name}{ROWS}", flat, matrix.codes))
