"""The graph of --graph portable: ai.onnx operators alone, for any runtime.

The norm, the rotary embedding and attention are spelled out, because their operators came with opset 23 and few
runtimes have them; what is left needs opset 18, 19 for int8 and 21 for int4. No control flow, and no operator that a
runtime could only run as a loop.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.plugins import h1
from h1export.quantize.precision import Precision
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context, Emitter
from h1export.targets.onnx.mamba import drive, log_decay, shifted_products, skip, step_sizes
from h1export.targets.onnx.masks import visible_keys
from h1export.targets.onnx.rotary import rotary_tables
from h1export.targets.onnxruntime.emit import dequantize_linear, kept
from h1export.targets.onnxruntime.emit.chunked_scan import Chunks, chunked_scan
from h1export.targets.onnxruntime.emit.matmul_nbits import OrtContext
from h1export.targets.sizes import AttentionSizes, ScanSizes

aten = torch.ops.aten


def opset(precisions: Collection[Precision]) -> int:
    """Return the oldest opset that suffices: int4 and blocks need 21, and ONNX's own evaluator runs int8 from 19 on."""
    return 21 if any(precision.group_size for precision in precisions) else 19 if precisions else 18


def linear(c: Context, node: Node) -> None:
    """Emit MatMul, over a DequantizeLinear where the weight is stored in integers."""
    x = c.value(args_of(node)[0])
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        weight = c.build.op("Transpose", c.weight(expr), perm=[1, 0])
    else:
        weight = dequantize_linear.dequantized(c, expr, precision)
    common.set_product(c, node, c.build.op("MatMul", x, weight))


def embedding(c: OrtContext, node: Node) -> None:
    """Emit Gather, and a product with the scales where the embedding is stored in integers."""
    expr = c.expr(args_of(node)[0])
    ids = c.value(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        c.set(node, c.embedded(ids, expr))
    else:
        c.set(node, dequantize_linear.embed(c, ids, expr, precision=precision))


def rms_norm(c: Context, node: Node) -> None:
    """Emit x / sqrt(mean(x^2) + epsilon) * weight."""
    x, _, weight, epsilon = args_of(node)
    b = c.build
    x = c.value(x)
    mean = b.op("ReduceMean", b.op("Mul", x, x), b.ints(-1), keepdims=1)
    y = b.op("Div", x, b.op("Sqrt", b.op("Add", mean, b.constant(epsilon, np.float32))))
    c.set(node, y if weight is None else b.op("Mul", y, c.value(weight)))


def _silu(c: Context, x: Value) -> Value:
    return c.build.op("Mul", x, c.build.op("Sigmoid", x))


def silu(c: Context, node: Node) -> None:
    """Emit x * sigmoid(x)."""
    c.set(node, _silu(c, c.value(args_of(node)[0])))


def causal_conv(c: Context, node: Node) -> None:
    """Emit products with shifted inputs, then SiLU."""
    total, carried = shifted_products(c, node)
    c.set(node, _silu(c, total), carried)


def ssm_scan(c: Context, node: Node) -> None:
    """Emit the chunked scan, whose operands are those of LinearAttention."""
    x, _dt, A, B, C, D, _dt_bias, state, mask, *_ = args_of(node)
    b = c.build
    step = step_sizes(c, node)
    chunks = b.once((mask, "chunks"), lambda: Chunks.of(b, b.op("Shape", c.value(mask), start=1, end=2)))
    driven, keys, queries = (
        b.op("Reshape", value, b.ints(0, 0, -1)) for value in (drive(c, c.value(x), step), c.value(B), c.value(C))
    )
    decay = log_decay(c, A, step)
    y, new_state = chunked_scan(
        b, ScanSizes.of(node), chunks, drive=driven, log_decay=decay, B=keys, C=queries, state=c.value(state)
    )
    c.set(node, b.op("Add", y, skip(c, c.value(x), D)), new_state)


def attention(c: Context, node: Node) -> None:
    """Emit softmax(q k + mask) v with queries [batch, kv heads, queries of each, seq, dim] over the grown cache."""
    q, k, v, past_k, past_v, positions, mask, _theta = args_of(node)
    b = c.build
    sizes = AttentionSizes.of(node)
    cos, sin = rotary_tables(c, node, 2, 3)  # [batch, seq, 1, dim / 2]
    hidden = b.once((mask, positions), lambda: _attention_mask(c, mask, positions))
    query = b.op("Mul", _rotate(c, q, cos, sin=sin, dim=sizes.head_dim), b.constant(sizes.scale, np.float32))
    by_group = b.op("Reshape", query, b.ints(0, 0, sizes.kv_heads, sizes.group, sizes.head_dim))
    query = b.op("Transpose", by_group, perm=[0, 2, 3, 1, 4])
    keys, values = (
        b.op("Concat", c.value(past), b.op("Transpose", new, perm=[0, 2, 1, 3]), axis=2)
        for past, new in ((past_k, _rotate(c, k, cos, sin=sin, dim=sizes.head_dim)), (past_v, c.value(v)))
    )
    scores = b.op("MatMul", query, b.op("Transpose", b.op("Unsqueeze", keys, b.ints(2)), perm=[0, 1, 2, 4, 3]))
    shares = b.op("Softmax", b.op("Add", scores, hidden), axis=-1)
    out = b.op("Transpose", b.op("MatMul", shares, b.op("Unsqueeze", values, b.ints(2))), perm=[0, 3, 1, 2, 4])
    c.set(node, b.op("Reshape", out, b.ints(0, 0, sizes.heads, sizes.head_dim)), keys, values)


def _rotate(c: Context, x: Any, cos: Value, *, sin: Value, dim: int) -> Value:
    """Emit the rotation of [batch, seq, heads, dim]: pairs are (i, i + dim / 2)."""
    b = c.build
    low, high = b.ops("Split", 2, c.value(x), b.ints(dim // 2, dim // 2), axis=3)
    first = b.op("Sub", b.op("Mul", low, cos), b.op("Mul", high, sin))
    return b.op("Concat", first, b.op("Add", b.op("Mul", high, cos), b.op("Mul", low, sin)), axis=3)


def _attention_mask(c: Context, mask: Any, positions: Any) -> Value:
    """Return what is added to scores, [batch, 1, 1, seq, total]: it hides pads and later tokens, never the own one."""
    b = c.build
    seq = b.op("Shape", c.value(positions), start=1, end=2)
    total = b.op("Shape", c.value(mask), start=1, end=2)
    column = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", total), b.constant(1, np.int64))
    own = b.op("Unsqueeze", b.op("Slice", column, b.op("Sub", total, seq), total), b.ints(1))
    visible = visible_keys(c, mask, column, own=own)
    hidden = b.op("Where", visible, b.constant(0.0, np.float32), b.constant(c.masked, np.float32))
    return b.op("Unsqueeze", hidden, b.ints(1, 2))


TABLE: Mapping[Any, Emitter[Any]] = {
    **common.TABLE,
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.rms_norm.default: rms_norm,
    aten.silu.default: silu,
    aten.narrow.default: kept.narrow,
}
