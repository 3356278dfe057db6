"""The graph of --graph wasm: products over weights in float32 that ONNX Runtime makes once, when a session is created.

MatMulNBits has no kernel of its own in WebAssembly: every call dequantises the whole weight and multiplies by it then
(onnxruntime 1.30, MatMulNBits::ComputeBUnpacked). Here constants alone lead to a weight, so ONNX Runtime folds them,
which it does not do with DequantizeLinear and GatherBlockQuantized. The weights' file has the bytes of --graph cpu; the
memory has 4 bytes for each weight, and BYTES while a session is created.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.fx import Node

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.errors import H1ExportError
from h1export.graphs.program import args_of
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING, tensor_shapes
from h1export.quantize.precision import Precision
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Emitter
from h1export.targets.onnxruntime.emit import cpu
from h1export.targets.onnxruntime.emit.matmul_nbits import FLOAT, MS, OrtContext, float_scales, write_quantized
from h1export.targets.onnxruntime.emit.packing import NBitsLayout

MEMORY = 4 << 30  # bytes that a page's WebAssembly can have
BYTES = 20  # of memory for a weight while it is unpacked: five float32, until what the last one is made of is dropped


def check(config: FalconH1Config) -> None:
    """Refuse a model whose weights do not fit into WebAssembly's memory while they are unpacked.

    Raises:
        H1ExportError: it is one of them.
    """
    shapes = tensor_shapes(config)
    gathered = set() if config.tie_word_embeddings else {EMBEDDING}
    weights = sum(shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and name not in gathered)
    if BYTES * weights > MEMORY:
        what = f"unpacks {weights} weights, which takes {BYTES * weights} bytes, and WebAssembly has {MEMORY}"
        raise H1ExportError("--graph wasm", what, "use --graph cpu, which is slower in WebAssembly, or WebGPU with it")


def linear(c: OrtContext, node: Node) -> None:
    """Emit a product with a weight [N, K] in float32, which constants unpack where it is stored in integers."""
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        cpu.linear(c, node)
        return
    weight = c.build.once((expr, "unpacked"), lambda: _unpacked(c, expr, precision))
    y = c.build.op("FusedMatMul", c.value(args_of(node)[0]), weight, domain=MS, transB=1)
    common.set_product(c, node, y)


def _unpacked(c: OrtContext, expr: WeightExpr, precision: Precision) -> Value:
    """Emit the weight [rows, columns] in float32 from its codes, scales, zero points and multipliers."""
    matrix = write_quantized(c, expr, precision)
    layout = matrix.layout
    b = c.build
    scales = float_scales(c, expr, matrix)
    codes = _signed(c, b.initializer(matrix.codes), layout)
    if matrix.zeros is not None:
        flat = b.op("Reshape", _signed(c, b.initializer(matrix.zeros), layout), b.ints(0, -1))
        zeros = b.op("Slice", flat, b.ints(0), b.ints(layout.blocks), b.ints(1))
        codes = b.op("Sub", codes, _over_blocks(c, zeros, layout))
    values = b.op("Mul", codes, _over_blocks(c, scales, layout))
    padded = b.op("Reshape", values, b.ints(0, -1))
    columns = expr.shape(c.store.shape)[1]
    if columns == layout.blocks * layout.block_size:
        return padded
    return b.op("Slice", padded, b.ints(0), b.ints(columns), b.ints(1))


def _signed(c: OrtContext, packed: Value, layout: NBitsLayout) -> Value:
    """Emit the signed codes of bytes [.., n] in float32: [.., n, 2] of int4, the low nibble first; [.., n] of int8."""
    b = c.build
    if layout.bits == 8:
        return b.op("Sub", b.op("Cast", packed, to=FLOAT), b.constant(layout.zero_point, np.float32))
    every = np.arange(256)
    pairs = np.stack([every & 15, every >> 4], axis=1) - layout.zero_point
    return b.op("Gather", b.constant(pairs, np.float32), b.op("Cast", packed, to=int(ir.DataType.INT32)))


def _over_blocks(c: OrtContext, values: Value, layout: NBitsLayout) -> Value:
    """Emit values [rows, blocks] with the axes of a block's codes behind them."""
    return c.build.op("Unsqueeze", values, c.build.ints(2, 3) if layout.bits == 4 else c.build.ints(2))


TABLE: Mapping[Any, Emitter[Any]] = {**cpu.TABLE, cpu.aten.linear.default: linear}
