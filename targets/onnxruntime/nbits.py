"""Integers as ONNX Runtime wants them: MatMulNBits, and the embedding that may share its bytes.

Codes are stored unsigned (zero point 8 or 128, the ops' default) and scales in float32 with µP multiplied in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.core.artifact import StoredPart, StoredWeight
from h1export.core.quant import Precision, QuantizedBlock, QuantizedTensor, quantized_blocks
from h1export.core.state import Array
from h1export.core.weights import WeightExpr
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import BLOCK_BYTES, Context, initializer_name

MS = "com.microsoft"
# int8 has one scale a row, repeated for MatMulNBits' blocks; small ones, because accuracy level 4 rounds activations by block
INT8_BLOCKS = (32, 16)
CODES, SCALES = ".codes", ".scales"
ROWS = ".rows"  # suffix of the name under which an embedding reads codes, one row a token

Codes = npt.NDArray[np.uint8]


class OrtContext(Context):
    """Context with what only this target's emitters need.

    Attributes:
        accuracy_level: of products with integers.
        product: op type and domain of such a product: MatMulNBits, or one that takes the same inputs and attributes.
    """

    accuracy_level: int = 0
    product = ("MatMulNBits", MS)


@dataclass(frozen=True)
class Layout:
    """How MatMulNBits stores [rows, columns]: whole blocks, the last one padded with zero points."""

    bits: int
    block: int
    columns: int

    @classmethod
    def of(cls, precision: Precision, columns: int) -> Layout:
        whole = (block for block in INT8_BLOCKS if columns % block == 0)
        return cls(precision.bits, precision.block or next(whole, INT8_BLOCKS[-1]), columns)

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def block_bytes(self) -> int:
        return self.block * self.bits // 8

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    def pack(self, codes: npt.NDArray[np.int8]) -> Codes:
        """int8 [rows, columns] -> uint8 [rows, blocks, block bytes]; int4 puts even columns into low nibbles."""
        unsigned = np.full((len(codes), self.blocks * self.block), self.zero_point, np.uint8)
        unsigned[:, : self.columns] = codes.view(np.uint8) + np.uint8(self.zero_point)  # wraps like two's complement
        if self.bits == 4:
            unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
        return unsigned.reshape(len(codes), self.blocks, self.block_bytes)

    def unpack(self, packed: Codes) -> npt.NDArray[np.int8]:
        """The inverse of ``pack``."""
        flat: Codes = packed.reshape(len(packed), -1)
        if self.bits == 4:
            flat = np.stack([flat & 15, flat >> 4], axis=2).reshape(len(flat), -1)
        return (flat[:, : self.columns] - np.uint8(self.zero_point)).view(np.int8)

    def scales(self, tensor: QuantizedTensor) -> Array:
        """float32 [rows, blocks]: fp16 scale times multiplier."""
        return self._repeated(tensor.scales.astype(np.float32) * tensor.multiplier[:, None])

    def plain_scales(self, tensor: QuantizedTensor) -> npt.NDArray[np.float16]:
        """float16 [rows, blocks]: the scales alone, for a graph that multiplies by the multiplier itself."""
        return self._repeated(tensor.scales)

    def _repeated(self, scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.broadcast_to(scales, (len(scales), self.blocks)) if scales.shape[1] == 1 else scales

    def unscale(self, stored: npt.NDArray[Any], multiplier: Array, groups: int) -> npt.NDArray[np.float16]:
        """The fp16 scales again: dividing by the multiplier lands within half a unit in the last place of float16."""
        if stored.dtype == np.float16:
            return np.asarray(stored[:, :groups])
        return (stored[:, :groups].astype(np.float64) / multiplier[:, None]).astype(np.float16)


def store(c: Context, expr: WeightExpr, precision: Precision) -> tuple[Layout, ir.ExternalTensor, ir.ExternalTensor]:
    """Write codes and scales of ``expr``, once, and note them for the manifest."""
    return c.data.once((expr, precision), lambda: _write(c, expr, precision))


def _write(c: Context, expr: WeightExpr, precision: Precision) -> tuple[Layout, ir.ExternalTensor, ir.ExternalTensor]:
    rows, columns = expr.shape(c.store.shape)
    layout, name = Layout.of(precision, columns), initializer_name(expr)
    half = c.activations is np.float16  # MatMulNBits wants scales of the activations' dtype: fp16 has no room for multipliers
    codes = c.data.place(name + CODES, ir.DataType.UINT8, (rows, layout.blocks, layout.block_bytes))
    scales = c.data.place(name + SCALES, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, (rows, layout.blocks))
    blocks = quantized_blocks(expr, c.store, precision, BLOCK_BYTES)
    c.data.fill([codes, scales], (partial(_stored_block, layout, half, block) for block in blocks))
    stored = tuple(StoredPart(part.tensor, c.store.shape(part.tensor)[expr.axis], part.multiplier) for part in expr.parts)
    c.stored.append(StoredWeight(name, precision.bits, precision.block, expr.axis, stored))
    return layout, codes, scales


def _stored_block(layout: Layout, half: bool, block: QuantizedBlock) -> tuple[Codes, npt.NDArray[Any]]:
    """Codes and scales of a block of rows, as they lie in the file."""
    parts = [(replace(layout, columns=tensor.codes.shape[1]), tensor) for tensor in block()]
    codes = [part.pack(tensor.codes) for part, tensor in parts]
    scales = [part.plain_scales(tensor) if half else part.scales(tensor) for part, tensor in parts]
    return np.concatenate(codes, axis=1), np.concatenate(scales, axis=1)


def matmul_nbits(c: OrtContext, x: Value, expr: WeightExpr, precision: Precision) -> Value:
    """x [.., K] times the quantised weight [N, K], transposed."""
    inputs, attributes = product_operands(c, expr, precision)
    op_type, domain = c.product
    return c.build.op(op_type, x, *inputs, domain=domain, **attributes)


def product_operands(c: OrtContext, expr: WeightExpr, precision: Precision) -> tuple[tuple[Value, Value], dict[str, int]]:
    """Codes and scales, and the attributes of a product with them."""
    layout, codes, scales = store(c, expr, precision)
    rows, columns = expr.shape(c.store.shape)
    attributes = {"K": columns, "N": rows, "bits": layout.bits, "block_size": layout.block, "accuracy_level": c.accuracy_level}
    return (c.build.initializer(codes), c.build.initializer(scales)), attributes


def embed_quantized(c: Context, ids: Value, expr: WeightExpr, precision: Precision) -> Value:
    """Rows ``ids`` of the quantised embedding in float32; a tied head reads the same bytes."""
    layout, codes, scales = store(c, expr, precision)
    build, flat = c.build, (expr.shape(c.store.shape)[0], layout.blocks * layout.block_bytes)
    table = build.initializer(c.data.alias(f"{codes.name}{ROWS}", flat, codes))
    if layout.bits == 4:
        attributes: dict[str, Any] = {"bits": 4, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 1}
        return build.op("GatherBlockQuantized", table, ids, build.initializer(scales), domain=MS, **attributes)
    signed = build.op("Sub", build.op("Cast", build.op("Gather", table, ids), to=1), build.constant(layout.zero_point, np.float32))
    values = build.op("Slice", signed, build.ints(0), build.ints(layout.columns), build.ints(2))
    scale = build.op("Slice", build.op("Gather", build.initializer(scales), ids), build.ints(0), build.ints(1), build.ints(2))
    return build.op("Mul", values, scale)


def read_stored(weight: StoredWeight, tensors: Mapping[str, Any], columns: Callable[[str], int]) -> Iterator[tuple[str, QuantizedTensor]]:
    """The integers that an artifact stores, by checkpoint tensor.

    Args:
        weight: the initializer's entry in the manifest.
        tensors: initializer name -> array.
        columns: of each checkpoint tensor.
    """
    precision = Precision(weight.bits, weight.block)
    width = sum(part.size for part in weight.parts) if weight.axis else columns(weight.parts[0].tensor)
    whole, start = Layout.of(precision, width), 0
    for part in weight.parts:
        place = (
            (slice(None), slice(start // whole.block, (start + part.size) // whole.block))
            if weight.axis
            else slice(start, start + part.size)
        )
        codes, scales = tensors[weight.initializer + CODES][place], tensors[weight.initializer + SCALES][place]
        layout, multiplier = replace(whole, columns=columns(part.tensor)), part.multiplier.rows(len(codes))
        groups = layout.blocks if weight.block else 1
        yield part.tensor, QuantizedTensor(layout.unpack(codes), layout.unscale(scales, multiplier, groups), multiplier)
        start += part.size
