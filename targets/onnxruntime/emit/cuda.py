"""The graph of --graph cuda: fp16 or bf16 activations, keys and values; the scan and its state in float32.

Every operator here has a kernel of these dtypes in ONNX Runtime's CUDA provider: its docs/OperatorKernels.md, repeated
for what this graph uses in tests/targets/onnxruntime/test_cuda.py. MatMulNBits and
GatherBlockQuantized compute in the dtype of their scales, and bf16 cannot hold the fp16 scales: with bf16 activations,
both compute in float32 between casts, and integers and scales stay those of the rule, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.program import args_of
from h1export.plugins import h1
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context, Emitter
from h1export.targets.onnx.mamba import drive, log_decay, shifted_products, skip, step_sizes
from h1export.targets.onnx.narrow import narrow_matrix
from h1export.targets.onnxruntime.emit.chunked_scan import Chunks, chunked_scan
from h1export.targets.onnxruntime.emit.cpu import TABLE as CPU_TABLE
from h1export.targets.onnxruntime.emit.cpu import grouped_attention
from h1export.targets.onnxruntime.emit.cuda_kernels import conv_refusal, scan_refusal
from h1export.targets.onnxruntime.emit.matmul_nbits import (
    MS,
    OrtContext,
    float_scales,
    gather_block_quantized,
    matmul_nbits,
    row_multipliers,
    write_quantized,
)
from h1export.targets.sizes import ScanSizes

aten = torch.ops.aten


class CudaContext(OrtContext):
    """A Context of fp16 activations.

    Small weights are stored in float32 and rounded when a session is made; matrices in fp16.
    """

    activations: type[Any] = np.float16
    matrices = ir.DataType.FLOAT16

    def weight(self, expr: WeightExpr) -> Value:
        return self.build.once((expr, "half"), lambda: self.as_activation(self.exact(expr)))

    def matrix(self, expr: WeightExpr) -> Value:
        """Return ``expr`` in the activations' dtype, written once. Raises H1ExportError for values beyond fp16."""
        return narrow_matrix(self, expr, self.matrices, next_step="use --activations bf16")


class Bfloat16Context(CudaContext):
    """A Context of bf16 activations, and matrices in bf16."""

    activations = ml_dtypes.bfloat16
    matrices = ir.DataType.BFLOAT16


def linear(c: CudaContext, node: Node) -> None:
    """Emit a product; integers keep the rule's fp16 scales, so µP multiplies the product, row by row."""
    x = c.value(args_of(node)[0])
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        y = c.build.op("FusedMatMul", x, c.matrix(expr), domain=MS, transB=1)
    else:
        y = matmul_nbits(c, x, expr, precision=precision)
        # with bf16 activations, the float32 scales contain µP
        multipliers = row_multipliers(c, expr) if c.activations is np.float16 else None
        y = y if multipliers is None else c.build.op("Mul", y, c.as_activation(multipliers))
    common.set_product(c, node, y)


def embedding(c: CudaContext, node: Node) -> None:
    """Emit GatherBlockQuantized for int4 and int8; a tied head reads the same bytes."""
    expr = c.expr(args_of(node)[0])
    ids = c.value(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        return c.set(node, c.build.op("Gather", c.matrix(expr), ids))
    matrix = write_quantized(c, expr, precision)
    layout = matrix.layout
    half = c.activations is np.float16
    scales = c.build.initializer(matrix.scales) if half else float_scales(c, expr, matrix)
    rows = gather_block_quantized(c, ids, expr, matrix=matrix, scales=scales)
    if layout.blocks * layout.block_size != layout.columns:
        rows = c.build.op("Slice", rows, c.build.ints(0), c.build.ints(layout.columns), c.build.ints(2))
    return c.set(node, rows if half else c.as_activation(rows))


def causal_conv(c: CudaContext, node: Node) -> None:
    """Emit one kernel, SiLU included; beyond its limits, products with shifted inputs in float32."""
    x, state, weight, bias = args_of(node)
    channels, _, taps = c.expr(weight).shape(c.store.shape)
    if conv_refusal(channels, taps):
        total, carried = shifted_products(c, node)
        return c.set(node, c.as_activation(c.build.op("QuickGelu", total, domain=MS, alpha=1.0)), carried)
    operands = [c.value(x), c.value(weight), None if bias is None else c.value(bias), c.value(state)]
    return c.set(node, *c.build.ops("CausalConvWithState", 2, *operands, domain=MS, activation="silu", channels_last=1))


def ssm_scan(c: CudaContext, node: Node) -> None:
    """Emit GatedDeltaNet without the delta: query C, key B, value dt x, log decay dt A, all float32.

    Its state is float32 whatever the rest is; LinearAttention's has the activations' dtype and would drift. With fp16
    inputs it may choose a kernel that rounds inside a chunk. Beyond its limits, the chunked scan takes its place.
    """
    x, _dt, A, B, C, D, _dt_bias, state, mask, *_ = args_of(node)
    sizes = ScanSizes.of(node)
    b = c.build
    step = step_sizes(c, node)
    exact, query, key = (c.as_float32(c.value(value)) for value in (x, C, B))
    driven, decay, before = drive(c, exact, step), log_decay(c, A, step), c.value(state)
    if scan_refusal(sizes):
        chunks = b.once((mask, "chunks"), lambda: Chunks.of(b, b.op("Shape", driven, start=1, end=2)))
        flat = {
            name: b.op("Reshape", value, b.ints(0, 0, -1))
            for name, value in (("drive", driven), ("B", key), ("C", query))
        }
        start = b.op("Transpose", before, perm=[0, 1, 3, 2])
        y, last = chunked_scan(b, sizes, chunks, log_decay=decay, state=start, **flat)
        after = b.op("Transpose", last, perm=[0, 1, 3, 2])
    else:
        operands = [query, key, driven, None, decay, None, before]
        y, after = b.ops("GatedDeltaNet", 2, *operands, domain=MS, update_rule="gated", scale=1.0)
    c.set(node, c.as_activation(b.op("Add", y, skip(c, exact, D))), after)


def attention(c: CudaContext, node: Node) -> None:
    """Emit attention as for the CPU, over a cache whose columns behind the tokens so far may be unused."""
    grouped_attention(c, node, fixed_length_mask)


def fixed_length_mask(c: Context, mask: Any, positions: Any) -> tuple[Value, ...]:
    """Return the bias [batch, 1, seq, total] that hides pads, and GroupQueryAttention's two lengths.

    A call of one token may have a mask of more columns than tokens: 1 for the tokens so far, 0 for unused columns, and
    1 in the last column for the new token, which then goes to the first unused column. So one length of the mask serves
    all steps, as a CUDA graph needs. Such rows have no pads: a row that begins with a pad has no unused columns.

    What differs from step to step is computed from the mask on the device. The CPU gets nothing but shapes, and no
    value goes from one to the other, which ONNX Runtime refuses in a captured graph.
    """
    b = c.build
    seq = b.op("Shape", c.value(positions), start=1, end=2)
    total = b.op("Shape", c.value(mask), start=1, end=2)
    past = b.op("Sub", total, seq)
    column = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", total), b.constant(1, np.int64))
    before = b.op("Slice", column, past, b.op("Add", past, b.ints(1)))
    last = b.op("Slice", column, b.ints(-1), b.ints(np.iinfo(np.int64).max))
    starts = b.op("Cast", b.op("Slice", c.value(mask), b.ints(0), b.ints(1), b.ints(1)), to=int(ir.DataType.BOOL))
    position = b.op("Slice", c.value(positions), b.ints(0), b.ints(1), b.ints(1))
    written = b.op("Where", starts, position, before)  # the column of the call's first token, [batch, 1]

    own = b.op("And", b.op("Equal", column, written), starts)
    visible = b.op("Or", own, b.op("Cast", c.value(mask), to=int(ir.DataType.BOOL)))
    pads = b.op("Sub", b.constant(1.0, np.float32), c.cast(visible, ir.DataType.FLOAT))
    rows = b.op("Unsqueeze", c.as_activation(b.op("Mul", pads, b.constant(c.masked, np.float32))), b.ints(1, 2))
    bias = b.op("Expand", rows, b.op("Concat", b.ints(1, 1), seq, b.ints(1), axis=0))
    end = b.op("Add", written, b.op("Sub", last, before))
    seqlens = b.op("Squeeze", c.cast(end, ir.DataType.INT32), b.ints(1))
    return bias, seqlens, b.op("Squeeze", c.cast(total, ir.DataType.INT32))


TABLE: Mapping[Any, Emitter[Any]] = {
    **CPU_TABLE,
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
}
