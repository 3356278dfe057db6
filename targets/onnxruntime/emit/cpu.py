"""The graph for ONNX Runtime on CPUs: one emitter for each op of a Program.

com.microsoft is ONNX Runtime's own domain; its ops are described in the project's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.plugins import h1
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context, Emitter, masked
from h1export.targets.onnx.mamba import drive, log_decay, shifted_products, skip, step_sizes
from h1export.targets.onnx.rotary import rotary_tables
from h1export.targets.onnxruntime.emit import int8_cache, kept
from h1export.targets.onnxruntime.emit.matmul_nbits import MS, OrtContext, embed_quantized, matmul_nbits
from h1export.targets.sizes import AttentionSizes, ScanSizes

OPSETS = {"": 23, MS: 1}

aten = torch.ops.aten


def linear(c: OrtContext, node: Node) -> None:
    """Emit MatMulNBits for a weight in integers, else a product with the weight as the checkpoint stores it, [N, K]."""
    x = c.value(args_of(node)[0])
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        y = c.build.op("FusedMatMul", x, c.weight(expr), domain=MS, transB=1)
    else:
        y = matmul_nbits(c, x, expr, precision=precision)
    common.set_product(c, node, y)


def embedding(c: OrtContext, node: Node) -> None:
    """Emit a gather of rows, dequantised where the embedding is stored in integers."""
    expr = c.expr(args_of(node)[0])
    ids = c.value(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        c.set(node, c.embedded(ids, expr))
    else:
        c.set(node, embed_quantized(c, ids, expr, precision=precision))


def add(c: Context, node: Node) -> None:
    """Emit a sum; where a norm reads it, one kernel computes both."""
    norms = [user for user in node.users if user.target is aten.rms_norm.default and args_of(user)[2] is not None]
    if not norms:
        return common.binary("Add")(c, node)
    (x, y) = args_of(node)
    (_, _, weight, epsilon) = args_of(norms[0])
    operands = (c.value(x), c.value(y), c.value(weight))
    normed, _, _, total = c.build.ops("SkipSimplifiedLayerNormalization", 4, *operands, domain=MS, epsilon=epsilon)
    c.set(node, total)
    return c.set(norms[0], normed)


def rms_norm(c: Context, node: Node) -> None:
    """Emit RMSNormalization over the last axis; without a weight its scale is ones."""
    x, (width,), weight, epsilon = args_of(node)
    scale = c.build.constant(np.ones(width), c.activations) if weight is None else c.value(weight)
    c.set(node, c.build.op("RMSNormalization", c.value(x), scale, axis=-1, epsilon=epsilon))


def _silu(c: Context, x: Value) -> Value:
    return c.build.op("QuickGelu", x, domain=MS, alpha=1.0)


def silu(c: Context, node: Node) -> None:
    """Emit QuickGelu with alpha 1, which is x * sigmoid(x) in one kernel."""
    c.set(node, _silu(c, c.value(args_of(node)[0])))


def _flat(c: Context, x: Any) -> Value:
    """Return [batch, seq, heads, dim] as [batch, seq, heads * dim], without a detour where x is a view of just that."""
    if x.target is aten.view.default and x.args[0].meta["val"].dim() == 3:
        return c.value(x.args[0])
    return c.build.op("Reshape", c.value(x), c.build.ints(0, 0, -1))


def causal_conv(c: Context, node: Node) -> None:
    """Emit products with shifted inputs, then SiLU."""
    total, carried = shifted_products(c, node)
    c.set(node, _silu(c, total), carried)


def ssm_scan(c: Context, node: Node) -> None:
    """Emit LinearAttention: query C, key B, value dt x, log decay dt A; its query heads are the SSM's groups."""
    x, _dt, A, B, C, D, _dt_bias, state, *_ = args_of(node)
    sizes = ScanSizes.of(node)
    b = c.build
    step = step_sizes(c, node)
    driven = drive(c, c.value(x), step)
    y, new_state = b.ops(
        "LinearAttention",
        2,
        _flat(c, C),
        _flat(c, B),
        b.op("Reshape", driven, b.ints(0, 0, -1)),
        c.value(state),
        log_decay(c, A, step),
        domain=MS,
        q_num_heads=sizes.groups,
        kv_num_heads=sizes.heads,
        update_rule="gated",
        scale=1.0,
    )
    skipped = skip(c, c.value(x), D)
    heads = b.op("Reshape", y, b.ints(0, 0, sizes.heads, sizes.d_head))
    c.set(node, b.op("Add", heads, skipped), new_state)


def attention(c: Context, node: Node) -> None:
    """Emit RotaryEmbedding on q and k, then GroupQueryAttention over the grown cache, with pads masked by a bias.

    Every row has the same physical length, so seqlens_k never tells pads apart: the bias does.
    """
    grouped_attention(c, node, _attention_mask)


def grouped_attention(c: Context, node: Node, make_mask: Callable[[Context, Any, Any], tuple[Value, ...]]) -> None:
    """Emit an h1.attention; ``make_mask`` returns the bias, seqlens_k and total_sequence_length, once for all layers.

    Its arguments are the context, and the nodes of the attention mask and of the positions. Where the cache
    has another dtype than the activations, the operator has that of the cache: to convert the cache around it would
    take longer than attention does. A cache in int8 is converted, because the operator's own kind of int8 has one
    scale for all tokens.
    """
    q, k, v, past_k, past_v, positions, mask, _theta = args_of(node)
    sizes = AttentionSizes.of(node)
    b = c.build
    cos, sin = rotary_tables(c, node)
    bias, seqlens, total = b.once((mask, positions), lambda: make_mask(c, mask, positions))
    rotated = [
        b.op("RotaryEmbedding", _flat(c, x), cos, sin, num_heads=heads)
        for x, heads in ((q, sizes.heads), (k, sizes.kv_heads))
    ]
    wide = ir.DataType.from_numpy(np.dtype(c.activations))
    dtype = c.value(past_k).dtype or wide
    operands = [*rotated, _flat(c, v), c.value(past_k), c.value(past_v)]
    present: tuple[Value, ...] = ()
    if dtype == ir.DataType.INT8:
        present, operands = _decoded(c, operands, sizes, mask=mask, positions=positions)
        dtype = wide
    if dtype != wide:
        operands[:3] = [c.cast(operand, dtype) for operand in operands[:3]]
        bias = b.once((bias, dtype), lambda: _narrow_bias(c, bias, dtype))
    out, *grown = b.ops(
        "GroupQueryAttention",
        3,
        *operands,
        seqlens,
        total,
        None,
        None,
        None,
        bias,
        domain=MS,
        num_heads=sizes.heads,
        kv_num_heads=sizes.kv_heads,
        scale=sizes.scale,
    )
    if dtype != wide:
        out = c.cast(out, wide)
    c.set(node, b.op("Reshape", out, b.ints(0, 0, sizes.heads, sizes.head_dim)), *(present or grown))


def _decoded(
    c: Context, operands: Sequence[Value], sizes: AttentionSizes, *, mask: Any, positions: Any
) -> tuple[tuple[Value, ...], list[Value]]:
    """Return (present keys and values in int8, operands): what GroupQueryAttention reads of q, k, v and the cache."""
    b = c.build

    def lengths() -> tuple[Value, Value]:
        total = b.op("Shape", c.value(mask), start=1, end=2)
        return b.op("Sub", total, b.op("Shape", c.value(positions), start=1, end=2)), total

    past_length, total = b.once((mask, positions, "lengths"), lengths)
    query, *new, past_keys, past_values = operands
    keys, values = (
        int8_cache.appended(
            b, one, past, past_length=past_length, total=total, heads=sizes.kv_heads, dim=sizes.head_dim
        )
        for one, past in zip(new, (past_keys, past_values), strict=True)
    )
    return (keys[0], values[0]), [query, keys[1], values[1], keys[2], values[2]]


def _attention_mask(c: Context, mask: Any, positions: Any) -> tuple[Value, Value, Value]:
    """Return the bias [batch, 1, seq, total] that hides pads, and GroupQueryAttention's two lengths."""
    build = c.build
    pads = build.op("Sub", build.constant(1.0, np.float32), c.cast(c.value(mask), ir.DataType.FLOAT))
    rows = build.op(
        "Unsqueeze", c.as_activation(build.op("Mul", pads, build.constant(c.masked, np.float32))), build.ints(1, 2)
    )
    seq = build.op("Shape", c.value(positions), start=1, end=2)
    total = build.op("Shape", c.value(mask), start=1, end=2)
    bias = build.op("Expand", rows, build.op("Concat", build.ints(1, 1), seq, build.ints(1), axis=0))
    batch = build.op("Shape", c.value(mask), start=0, end=1)
    last = c.cast(build.op("Sub", total, build.ints(1)), ir.DataType.INT32)
    return bias, build.op("Expand", last, batch), build.op("Squeeze", c.cast(total, ir.DataType.INT32))


def _narrow_bias(c: Context, bias: Value, dtype: ir.DataType) -> Value:
    """Return the bias in a dtype with fewer bits, in which what hides a key is finite too."""
    return c.cast(c.build.op("Max", bias, c.build.constant(masked(dtype.numpy()), np.float32)), dtype)


TABLE: Mapping[Any, Emitter[OrtContext]] = {
    **common.TABLE,
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.rms_norm.default: rms_norm,
    aten.silu.default: silu,
    aten.add.Tensor: add,
    aten.narrow.default: kept.narrow,
}
