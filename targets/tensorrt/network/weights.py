"""Integers in the network: symmetric int4 in groups for products, and words for the embedding.

TensorRT's builder keeps int4 packed. TensorRT's builder keeps int4 packed. A product reads DequantizeLinear's codes
[columns, rows] with the rule's fp16 scales; µP is one Mul behind it. The builder would dequantise a whole table before
it gathers rows, so an embedding's codes are stored in int32 words, and a call gathers its rows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.artifact.manifest import StoredWeight
from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.packed_format import ORDER
from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedBlock, quantized_blocks
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.column_major import CODES, SCALES, pack, read_column_major, unpack
from h1export.targets.onnx.column_major_writer import write_column_major
from h1export.targets.onnx.emit import initializer_name
from h1export.targets.tensorrt.network.context import TensorRTContext

WORDS = ".words"
WORD_BITS = 32
SIGN = 1 << 31  # subtracted from a word before it is stored, so that int32 holds it

Words = npt.NDArray[np.int32]


def dequantized(c: TensorRTContext, expr: WeightExpr, precision: Precision) -> Value:
    """Emit the matrix [columns, rows] without µP, in the activations' dtype."""
    return c.build.once((expr, precision), lambda: _dequantized(c, expr, precision))


def _dequantized(c: TensorRTContext, expr: WeightExpr, precision: Precision) -> Value:
    codes, scales = write_column_major(
        c, expr, precision, dtype=ir.DataType.FLOAT16, scales_of=lambda tensor: tensor.scales
    )
    c.note_stored(expr, precision)
    operands = c.build.initializer(codes), c.build.initializer(scales)
    return c.as_activation(c.build.op("DequantizeLinear", *operands, axis=0, block_size=precision.group_size))


def row_multipliers(c: TensorRTContext, expr: WeightExpr) -> Value | None:
    """Return the µP multiplier of each row, [rows] or [1], in the activations' dtype; None where all are 1."""
    multipliers = {part.multiplier for part in expr.parts}
    if multipliers == {Multiplier()}:
        return None
    if len(multipliers) == 1 and expr.parts[0].multiplier.is_scalar:
        return c.as_activation(c.build.constant([expr.parts[0].multiplier.factor], np.float32))
    return c.as_activation(c.row_multipliers(expr))


def embed(c: TensorRTContext, ids: Value, expr: WeightExpr, *, precision: Precision) -> Value:
    """Emit rows ``ids`` of the embedding in float32, exactly.

    Integers that a tied head reads too are noted by the head.
    """
    rows, columns = c.store.shape(expr.only.tensor)
    assert expr.only.multiplier == Multiplier(), "an embedding is stored without a multiplier"
    name = initializer_name(expr)
    b = c.build
    bits = precision.bits
    group_size = precision.columns_per_group(columns)
    groups = columns // group_size
    words = c.data.place(name + WORDS, ir.DataType.INT32, (rows, columns * bits // WORD_BITS))
    scales = c.data.place(name + WORDS + SCALES, ir.DataType.FLOAT16, (rows, groups))
    stored = quantized_blocks(expr, c.store, c.integers, max_bytes=BLOCK_BYTES)
    c.data.fill([words, scales], (partial(_rows, bits, one) for one in stored))
    if not c.is_multiplied(expr.only.tensor):
        c.note_stored(expr, precision)
    unsigned = b.op(
        "Add",
        b.op("Cast", b.op("Gather", b.initializer(words), ids), to=int(ir.DataType.INT64)),
        b.constant(SIGN, np.int64),
    )
    places = b.constant([1 << shift for shift in range(0, WORD_BITS, bits)], np.int64)
    base = b.constant(1 << bits, np.int64)
    shifted = b.op("Div", b.op("Unsqueeze", unsigned, b.ints(3)), places)
    digits = b.op("Sub", shifted, b.op("Mul", b.op("Div", shifted, base), base))
    codes = b.op("Sub", c.as_float32(digits), b.constant(1 << (bits - 1), np.float32))
    scale = b.op("Unsqueeze", c.as_float32(b.op("Gather", b.initializer(scales), ids)), b.ints(3))
    values = b.op("Mul", b.op("Reshape", codes, b.ints(0, 0, groups, group_size)), scale)
    return b.op("Reshape", values, b.ints(0, 0, columns))


def words_of(codes: npt.NDArray[np.int8], bits: int) -> Words:
    """Pack int8 [rows, columns] into [rows, words]: the first code in the lowest bits, each plus half its range."""
    unsigned = (codes.view(np.uint8) + np.uint8(1 << (bits - 1))).view(np.int8)  # wraps like two's complement
    packed = pack(unsigned) if bits == 4 else unsigned.view(np.uint8)
    words: npt.NDArray[np.uint32] = np.ascontiguousarray(packed).view("<u4")
    return (words ^ np.uint32(SIGN)).view(np.int32)


def codes_of(words: Words, bits: int) -> npt.NDArray[np.int8]:
    """Undo ``words_of``."""
    packed = (np.ascontiguousarray(words).view(np.uint32) ^ np.uint32(SIGN)).view(np.uint8)
    unsigned = unpack(packed.reshape(-1)).reshape(len(words), -1).view(np.uint8) & 15 if bits == 4 else packed
    return (unsigned - np.uint8(1 << (bits - 1))).view(np.int8)


def _rows(bits: int, block: QuantizedBlock) -> tuple[Words, npt.NDArray[np.float16]]:
    (tensor,) = block()
    return words_of(tensor.codes, bits), tensor.scales


def key(name: str) -> str | None:
    """Return the key of an initializer that ``read_stored`` reads; None for any other."""
    return name if name.startswith(ORDER) or name.endswith((CODES, SCALES, WORDS)) else None


def read_stored(
    weight: StoredWeight, tensors: Mapping[str, Any], columns: Callable[[str], int]
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield the integers that an artifact stores, by checkpoint tensor, as ``targets/onnx/read_back.py`` calls it."""
    name = weight.initializer
    start = 0
    if name + CODES in tensors:
        rows = sum(part.size for part in weight.parts)
        codes = read_column_major(tensors[name + CODES], weight.bits, rows)
        scales = tensors[name + SCALES].T
    else:
        codes = codes_of(np.asarray(tensors[name + WORDS]), weight.bits)
        scales = tensors[name + WORDS + SCALES]
    for part in weight.parts:
        place = slice(start, start + part.size)
        yield part.tensor, QuantizedTensor(codes[place], np.asarray(scales[place]), part.multiplier.rows(part.size))
        start += part.size
