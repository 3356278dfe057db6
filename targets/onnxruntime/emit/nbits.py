"""Integers as ONNX Runtime wants them: MatMulNBits, and the embedding that may share its bytes.

Codes are stored unsigned (zero point 8 or 128, the ops' default, where a tensor has none of its own), scales in float16 as the integer
rule has them: a block of 32 int4 codes is 18 bytes. MatMulNBits wants scales of its activations' dtype, so float32 ones with µP
multiplied in are nodes, which ONNX Runtime computes once, when a session is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from h1export.artifact.manifest import StoredWeight
from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedBlock, quantized_blocks
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.column_major import CODES, SCALES, ZEROS
from h1export.targets.onnx.emit import Context, initializer_name, stored_parts

MS = "com.microsoft"
FLOAT = int(ir.DataType.FLOAT)
# int8 has one scale a row, repeated for MatMulNBits' blocks; small ones, because accuracy level 4 rounds activations by block
INT8_BLOCKS = (32, 16)
ROWS = ".rows"  # suffix of the name under which an embedding reads codes, one row a token

Codes = npt.NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)


class OrtContext(Context):
    """Context with what only this target's emitters need.

    Attributes:
        accuracy_level: of products with integers.
    """

    accuracy_level: int = 0


@dataclass(frozen=True)
class Layout:
    """How MatMulNBits stores [rows, columns]: whole blocks, the last one padded with zero points."""

    bits: int
    block: int
    columns: int

    @classmethod
    def of(cls, precision: Precision, columns: int) -> Layout:
        whole = (block for block in INT8_BLOCKS if columns % block == 0)
        return cls(precision.bits, precision.group_size or next(whole, INT8_BLOCKS[-1]), columns)

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

    @property
    def zero_bytes(self) -> int:
        """Of the zero points of a row."""
        return -(-self.blocks * self.bits // 8)

    def pack_zeros(self, zeros: npt.NDArray[np.int8]) -> Codes:
        """int8 [rows, blocks] -> uint8 [rows, zero bytes]; int4 puts even blocks into low nibbles."""
        unsigned = np.zeros((len(zeros), self.zero_bytes * 8 // self.bits), np.uint8)
        unsigned[:, : self.blocks] = zeros.view(np.uint8) + np.uint8(self.zero_point)
        return unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4)) if self.bits == 4 else unsigned

    def unpack_zeros(self, packed: Codes) -> npt.NDArray[np.int8]:
        """The inverse of ``pack_zeros``."""
        flat = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1) if self.bits == 4 else packed
        return np.ascontiguousarray(flat[:, : self.blocks] - np.uint8(self.zero_point)).view(np.int8)

    def spread(self, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """[rows, blocks] of scales or zero points: one for a row stands in each of its blocks."""
        return np.broadcast_to(values, (len(values), self.blocks)) if values.shape[1] == 1 else values


@dataclass(frozen=True)
class Stored:
    """A weight in the external data.

    Attributes:
        layout: of its rows.
        codes: uint8 [rows, blocks, block bytes].
        scales: float16 [rows, blocks].
        zeros: uint8 [rows, zero bytes], where it has zero points of its own.
    """

    layout: Layout
    codes: ir.ExternalTensor
    scales: ir.ExternalTensor
    zeros: ir.ExternalTensor | None

    def zero_points(self, c: Context) -> tuple[Value, ...]:
        """The last operand of the ops that read it."""
        return () if self.zeros is None else (c.build.initializer(self.zeros),)


def store(c: Context, expr: WeightExpr, precision: Precision) -> Stored:
    """Write codes, scales and zero points of ``expr``, once, and note them for the manifest."""
    return c.data.once((expr, precision), lambda: _write(c, expr, precision))


def _write(c: Context, expr: WeightExpr, precision: Precision) -> Stored:
    rows, columns = expr.shape(c.store.shape)
    layout = Layout.of(precision, columns)
    name = initializer_name(expr)
    codes = c.data.place(name + CODES, ir.DataType.UINT8, (rows, layout.blocks, layout.block_bytes))
    scales = c.data.place(name + SCALES, ir.DataType.FLOAT16, (rows, layout.blocks))
    zeros = c.data.place(name + ZEROS, ir.DataType.UINT8, (rows, layout.zero_bytes)) if precision.zeros else None
    places = [codes, scales] if zeros is None else [codes, scales, zeros]
    blocks = quantized_blocks(expr, c.store, c.integers, max_bytes=BLOCK_BYTES)
    c.data.fill(places, (partial(_stored_block, layout, block) for block in blocks))
    c.stored.append(
        StoredWeight(name, precision.bits, precision.group_size, axis=expr.axis, parts=stored_parts(c, expr))
    )
    return Stored(layout, codes, scales, zeros=zeros)


def _stored_block(layout: Layout, block: QuantizedBlock) -> tuple[npt.NDArray[Any], ...]:
    """Codes, scales and zero points of a block of rows, as they lie in the file."""
    parts = [(replace(layout, columns=tensor.codes.shape[1]), tensor) for tensor in block()]
    codes = np.concatenate([part.pack(tensor.codes) for part, tensor in parts], axis=1)
    scales = np.concatenate([part.spread(tensor.scales) for part, tensor in parts], axis=1)
    zeros = [part.spread(tensor.zeros) for part, tensor in parts if tensor.zeros is not None]
    return (codes, scales, layout.pack_zeros(np.concatenate(zeros, axis=1))) if zeros else (codes, scales)


def matmul_nbits(c: OrtContext, x: Value, expr: WeightExpr, *, precision: Precision) -> Value:
    """x [.., K] times the quantised weight [N, K], transposed; without µP where activations are fp16."""
    stored = store(c, expr, precision)
    scales = c.build.initializer(stored.scales) if c.activations is np.float16 else float_scales(c, expr, stored)
    operands = (c.build.initializer(stored.codes), scales, *stored.zero_points(c))
    return c.build.op("MatMulNBits", x, *operands, domain=MS, **attributes(c, expr, stored))


def attributes(c: OrtContext, expr: WeightExpr, stored: Stored) -> dict[str, int]:
    """Those of MatMulNBits, and of our own products."""
    (rows, columns) = expr.shape(c.store.shape)
    layout = stored.layout
    return {
        "K": columns,
        "N": rows,
        "bits": layout.bits,
        "block_size": layout.block,
        "accuracy_level": c.accuracy_level,
    }


def factors(c: Context, expr: WeightExpr) -> Value | None:
    """µP of each row of an expression along axis 0, float32 [rows]; None where all are 1."""
    if all(part.multiplier == Multiplier() for part in expr.parts):
        return None
    shape = expr.shape(c.store.shape)[:1]
    made = c.small_tensor(
        f"{initializer_name(expr)}.multiplier", shape, lambda: np.concatenate([p.factors(c.store) for p in expr.parts])
    )
    return c.build.initializer(made)


def float_scales(c: Context, expr: WeightExpr, stored: Stored) -> Value:
    """float32 [rows, blocks]: scales times µP, from constants alone."""
    return c.build.once((expr, "float scales"), lambda: _float_scales(c, expr, stored))  # type: ignore[no-any-return]


def _float_scales(c: Context, expr: WeightExpr, stored: Stored) -> Value:
    b = c.build
    scales = b.op("Cast", b.initializer(stored.scales), to=FLOAT)
    if expr.axis == 1:
        blocks = [c.store.shape(part.tensor)[1] // stored.layout.block for part in expr.parts]
        return b.op(
            "Mul", scales, b.constant(np.repeat([part.multiplier.factor for part in expr.parts], blocks), np.float32)
        )
    multiplier = factors(c, expr)
    return scales if multiplier is None else b.op("Mul", scales, b.op("Unsqueeze", multiplier, b.ints(1)))


def embed_quantized(c: Context, ids: Value, expr: WeightExpr, *, precision: Precision) -> Value:
    """Rows ``ids`` of the quantised embedding in float32; a tied head reads the same bytes."""
    stored = store(c, expr, precision)
    b = c.build
    assert not precision.zeros, "no checkpoint has integers for its embedding"
    if precision.bits == 4:
        return gather_block_quantized(c, ids, expr, stored=stored, scales=float_scales(c, expr, stored))
    layout = stored.layout
    gathered = b.op("Gather", embedding_table(c, expr, stored), ids)
    signed = b.op("Sub", b.op("Cast", gathered, to=FLOAT), b.constant(layout.zero_point, np.float32))
    values = b.op("Slice", signed, b.ints(0), b.ints(layout.columns), b.ints(2))
    # one scale a row: the first block's, in float32 once it is gathered, or a session would hold them all in float32
    scale = b.op("Slice", b.op("Gather", b.initializer(stored.scales), ids), b.ints(0), b.ints(1), b.ints(2))
    return b.op("Mul", values, b.op("Cast", scale, to=FLOAT))


def gather_block_quantized(c: Context, ids: Value, expr: WeightExpr, *, stored: Stored, scales: Value) -> Value:
    """Rows ``ids`` of an embedding, whole blocks of them, in the dtype of ``scales``."""
    layout = stored.layout
    how = {"bits": layout.bits, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 1}
    return c.build.op("GatherBlockQuantized", embedding_table(c, expr, stored), ids, scales, domain=MS, **how)


def embedding_table(c: Context, expr: WeightExpr, stored: Stored) -> Value:
    """The codes of an embedding, one flat row a token: bytes that a tied head reads too."""
    assert expr.only.multiplier == Multiplier(), "an embedding is stored without a multiplier"
    flat = (expr.shape(c.store.shape)[0], stored.layout.blocks * stored.layout.block_bytes)
    return c.build.initializer(c.data.alias(f"{stored.codes.name}{ROWS}", flat, stored.codes))


def read_stored(
    weight: StoredWeight, tensors: Mapping[str, Any], columns: Callable[[str], int]
) -> Iterator[tuple[str, QuantizedTensor]]:
    """The integers that an artifact stores, by checkpoint tensor.

    Args:
        weight: the initializer's entry in the manifest.
        tensors: initializer name -> array.
        columns: of each checkpoint tensor.
    """
    precision = Precision(weight.bits, weight.group_size)
    zeros = tensors.get(weight.initializer + ZEROS)
    width = sum(part.size for part in weight.parts) if weight.axis else columns(weight.parts[0].tensor)
    whole = Layout.of(precision, width)
    start = 0
    for part in weight.parts:
        rows = slice(start, start + part.size)
        blocks = slice(None)
        if weight.axis:
            rows = slice(None)
            blocks = slice(start // whole.block, (start + part.size) // whole.block)
        codes = tensors[weight.initializer + CODES][rows, blocks]
        scales = tensors[weight.initializer + SCALES][rows, blocks]
        layout = replace(whole, columns=columns(part.tensor))
        multiplier = part.multiplier.rows(len(codes))
        groups = slice(layout.blocks if weight.group_size else 1)
        shifts = None if zeros is None else whole.unpack_zeros(np.asarray(zeros[rows]))[:, blocks][:, groups]
        yield (
            part.tensor,
            QuantizedTensor(layout.unpack(codes), np.asarray(scales[:, groups]), multiplier, zeros=shifts),
        )
        start += part.size
