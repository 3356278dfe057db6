"""One emitter per op: the whole of what a Program becomes in ONNX Runtime.

com.microsoft is ONNX Runtime's own domain; its ops are described in the project's ContribOperators.md.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.program import args_of
from h1export.plugins import h1
from h1export.plugins.attention.op import rope_frequencies
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context, Emitter
from h1export.targets.onnxruntime.emit.nbits import OrtContext, embed_quantized, matmul_nbits

MS = "com.microsoft"
OPSETS = {"": 23, MS: 1}

aten = torch.ops.aten


def linear(c: OrtContext, node: Node) -> None:
    """MatMulNBits where it is stored in integers, else a product with the weight as the checkpoint stores it, [N, K]."""
    x = c.value(args_of(node)[0])
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    y = (
        matmul_nbits(c, x, expr, precision=precision)
        if precision
        else c.build.op("FusedMatMul", x, c.weight(expr), domain=MS, transB=1)
    )
    bias = args_of(node)[2] if len(args_of(node)) > 2 else None
    c.set(node, y if bias is None else c.build.op("Add", y, c.value(bias)))


def embedding(c: Context, node: Node) -> None:
    expr = c.expr(args_of(node)[0])
    ids = c.value(args_of(node)[1])
    precision = c.precision(expr)
    c.set(
        node,
        c.build.op("Gather", c.weight(expr), ids)
        if precision is None
        else embed_quantized(c, ids, expr, precision=precision),
    )


def add(c: Context, node: Node) -> None:
    """Where a norm reads the sum, both in one kernel."""
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
    x, (width,), weight, epsilon = args_of(node)
    scale = c.build.constant(np.ones(width), c.activations) if weight is None else c.value(weight)
    c.set(node, c.build.op("RMSNormalization", c.value(x), scale, axis=-1, epsilon=epsilon))


def _silu(c: Context, x: Value) -> Value:
    return c.build.op("QuickGelu", x, domain=MS, alpha=1.0)  # x * sigmoid(x) in one kernel


def silu(c: Context, node: Node) -> None:
    c.set(node, _silu(c, c.value(args_of(node)[0])))


def _flat(c: Context, x: Any) -> Value:
    """[batch, seq, heads, dim] -> [batch, seq, heads * dim], without a detour where x is a view of just that."""
    if x.target is aten.view.default and x.args[0].meta["val"].dim() == 3:
        return c.value(x.args[0])
    return c.build.op("Reshape", c.value(x), c.build.ints(0, 0, -1))


def shifted_products(c: Context, node: Node) -> tuple[Value, Value]:
    """The convolution of an h1.causal_conv before its SiLU, and the inputs to carry on: a product and a sum for each tap.

    Instead of CausalConvWithState, whose CPU kernel is scalar (4 times slower at 512 tokens), or Conv (20 times slower at one).
    """
    x, state, weight, bias = args_of(node)
    taps = conv_taps(c, c.expr(weight))
    count, channels = taps.shape.numpy()
    row_bytes = (taps.length or 0) // count
    inputs = c.build.op("Concat", c.value(state), c.value(x), axis=1)

    def window(first: int, end: int) -> Value:
        return c.build.op("Slice", inputs, c.build.ints(first), c.build.ints(end), c.build.ints(1))

    total = None if bias is None else c.value(bias)
    for tap in range(count):
        end = np.iinfo(np.int64).max if tap == count - 1 else tap + 1 - count
        row = c.build.initializer(c.data.alias(f"{taps.name}.{tap}", (channels,), taps, start=tap * row_bytes))
        product = c.build.op("Mul", window(tap, end), row)
        total = product if total is None else c.build.op("Add", total, product)
    assert total is not None
    return total, window(1 - count, np.iinfo(np.int64).max)


def conv_taps(c: Context, weight: WeightExpr) -> ir.ExternalTensor:
    """A convolution's weight [channels, 1, taps] as [taps, channels], channels last like its input."""
    channels, _, taps = weight.shape(c.store.shape)
    return c.small_tensor(f"{weight.only.tensor}.taps", (taps, channels), lambda: weight.dense(c.store)[:, 0].T)


def causal_conv(c: Context, node: Node) -> None:
    total, carried = shifted_products(c, node)
    c.set(node, _silu(c, total), carried)


def ssm_scan(c: Context, node: Node) -> None:
    """LinearAttention: query C, key B, value dt x, log decay dt A; fewer query heads than value heads are SSM groups."""
    x, dt, A, B, C, D, dt_bias, state, mask, _chunk, dt_min, dt_max = args_of(node)
    config = c.program.config
    build = c.build
    step = build.op("Softplus", build.op("Add", c.value(dt), c.value(dt_bias)))
    if (dt_min, dt_max) != (0.0, math.inf):
        high = None if dt_max == math.inf else build.constant(dt_max, np.float32)
        step = build.op("Clip", step, build.constant(dt_min, np.float32), high)
    column = build.once((mask, "column"), lambda: build.op("Unsqueeze", c.value(mask), build.ints(2)))
    step = build.op("Mul", step, column)
    drive = build.op("Mul", c.value(x), build.op("Unsqueeze", step, build.ints(3)))
    y, new_state = build.ops(
        "LinearAttention",
        2,
        _flat(c, C),
        _flat(c, B),
        build.op("Reshape", drive, build.ints(0, 0, -1)),
        c.value(state),
        build.op("Mul", step, c.value(A)),
        domain=MS,
        q_num_heads=config.mamba_n_groups,
        kv_num_heads=config.mamba_n_heads,
        update_rule="gated",
        scale=1.0,
    )
    skip = build.op("Mul", c.value(x), build.op("Unsqueeze", c.value(D), build.ints(1)))
    heads = build.op("Reshape", y, build.ints(0, 0, config.mamba_n_heads, config.mamba_d_head))
    c.set(node, build.op("Add", heads, skip), new_state)


def attention(c: Context, node: Node) -> None:
    """RotaryEmbedding on q and k, then GroupQueryAttention over the grown cache, pads masked by a bias.

    Every row has the same physical length, so seqlens_k never tells pads apart: the bias does.
    """
    q, k, v, past_k, past_v, positions, mask, theta = args_of(node)
    config = c.program.config
    build = c.build
    cos, sin = rotary_tables(c, positions, theta)
    bias, seqlens, total = build.once((mask, positions), lambda: _attention_mask(c, mask, positions))
    rotated = [
        build.op("RotaryEmbedding", _flat(c, x), cos, sin, num_heads=heads)
        for x, heads in ((q, config.num_attention_heads), (k, config.num_key_value_heads))
    ]
    out, keys, values = build.ops(
        "GroupQueryAttention",
        3,
        *rotated,
        _flat(c, v),
        c.value(past_k),
        c.value(past_v),
        seqlens,
        total,
        None,
        None,
        None,
        bias,
        domain=MS,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
    )
    c.set(node, build.op("Reshape", out, build.ints(0, 0, config.num_attention_heads, config.head_dim)), keys, values)


def rotary_tables(c: Context, positions: Any, theta: Any) -> tuple[Value, Value]:
    """cos and sin, [batch, seq, dim / 2], for just the positions at hand: a table for 256K positions would be 134 MB."""
    return c.build.once((positions, theta), lambda: _rotary_tables(c, positions, theta))  # type: ignore[no-any-return]


def _rotary_tables(c: Context, positions: Any, theta: Any) -> tuple[Value, Value]:
    frequencies = rope_frequencies(theta, c.program.config.head_dim)
    position = c.build.op("Unsqueeze", c.build.op("Cast", c.value(positions), to=1), c.build.ints(2))
    angles = c.build.op("Mul", position, c.build.constant(frequencies.numpy(), np.float32))
    return c.as_activation(c.build.op("Cos", angles)), c.as_activation(c.build.op("Sin", angles))


def _attention_mask(c: Context, mask: Any, positions: Any) -> tuple[Value, Value, Value]:
    """The bias [batch, 1, seq, total] that hides pads, and GroupQueryAttention's two lengths."""
    build = c.build
    pads = build.op("Sub", build.constant(1.0, np.float32), build.op("Cast", c.value(mask), to=1))
    rows = build.op(
        "Unsqueeze", c.as_activation(build.op("Mul", pads, build.constant(c.masked, np.float32))), build.ints(1, 2)
    )
    seq = build.op("Shape", c.value(positions), start=1, end=2)
    total = build.op("Shape", c.value(mask), start=1, end=2)
    bias = build.op("Expand", rows, build.op("Concat", build.ints(1, 1), seq, build.ints(1), axis=0))
    batch = build.op("Shape", c.value(mask), start=0, end=1)
    last = build.op("Cast", build.op("Sub", total, build.ints(1)), to=6)
    return bias, build.op("Expand", last, batch), build.op("Squeeze", build.op("Cast", total, to=6))


TABLE: dict[Any, Emitter[OrtContext]] = {
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.rms_norm.default: rms_norm,
    aten.silu.default: silu,
    aten.add.Tensor: add,
    aten.sub.Tensor: common.binary("Sub"),
    aten.mul.Tensor: common.binary("Mul"),
    aten.cat.default: common.cat,
    aten.cumsum.default: common.cumsum,
    aten.index_select.default: common.index_select,
    aten.clamp.default: common.clamp,
    aten.narrow.default: common.narrow,
    aten.split_with_sizes.default: common.split,
    aten.to.dtype: common.to_dtype,
    aten.unsqueeze.default: common.unsqueeze,
    aten.view.default: common.view,
    aten.sym_size.int: common.size,
    operator.sub: common.size_sub,
    operator.getitem: common.getitem,
}
