"""The network's emitters: one for each op of a Program.

Norms, the residual stream and the scan's state are float32; products, attention and what lies between are the
activations' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.model.falcon_h1.states import INPUT_IDS
from h1export.plugins import h1
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Emitter
from h1export.targets.onnx.masks import visible_keys
from h1export.targets.onnx.rotary import rotary_tables
from h1export.targets.sizes import AttentionSizes, size_of
from h1export.targets.tensorrt.network.context import TensorRTContext
from h1export.targets.tensorrt.network.layout import FLOAT
from h1export.targets.tensorrt.network.weights import dequantized, embed, row_multipliers
from h1export.targets.tensorrt.plugin.schema import NAMESPACE, VERSION

aten = torch.ops.aten

PLUGIN: Mapping[str, Any] = {
    "domain": NAMESPACE,
    "plugin_namespace": NAMESPACE,
    "plugin_version": VERSION,
    "state_in_place": 1,
}


def linear(c: TensorRTContext, node: Node) -> None:
    """Emit a product with integers and µP behind it, or with a matrix into which µP is folded."""
    x = c.as_activation(c.value(args_of(node)[0]))
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        y = c.build.op("MatMul", x, c.build.op("Transpose", c.matrix(expr), perm=[1, 0]))
    else:
        y = c.build.op("MatMul", x, dequantized(c, expr, precision))
        multipliers = row_multipliers(c, expr)
        y = y if multipliers is None else c.build.op("Mul", y, multipliers)
    common.set_product(c, node, y)


def embedding(c: TensorRTContext, node: Node) -> None:
    """Emit rows of the embedding in float32, as the residual stream stays: sums over layers leave fp16's range."""
    expr = c.expr(args_of(node)[0])
    ids = c.value(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        return c.set(node, c.as_float32(c.build.op("Gather", c.matrix(expr), ids)))
    return c.set(node, embed(c, ids, expr, precision=precision))


def rms_norm(c: TensorRTContext, node: Node) -> None:
    """Emit a norm in float32: a square leaves the range of fp16 from 256 on."""
    x, (width,), weight, epsilon = args_of(node)
    scale = c.build.constant(np.ones(width), np.float32) if weight is None else c.exact(c.expr(weight))
    normed = c.build.op("RMSNormalization", c.as_float32(c.value(x)), scale, axis=-1, epsilon=epsilon)
    c.set(node, c.as_activation(normed))


def silu(c: TensorRTContext, node: Node) -> None:
    """Emit x * sigmoid(x)."""
    x = c.value(args_of(node)[0])
    c.set(node, c.build.op("Mul", x, c.build.op("Sigmoid", x)))


def binary(op_type: str) -> Emitter[TensorRTContext]:
    """Return the emitter of an elementwise op of tensors, or a tensor and a number, in float32 where a tensor is."""

    def emit(c: TensorRTContext, node: Node) -> None:
        values = [c.value(argument) if isinstance(argument, Node) else argument for argument in args_of(node)]
        dtypes = [value.dtype for value in values if isinstance(value, ir.Value)]
        dtype = FLOAT if FLOAT in dtypes else dtypes[0]
        assert dtype is not None, f"{node} has an operand without a dtype"
        c.set(node, c.build.op(op_type, *(_operand(c, value, dtype) for value in values)))

    return emit


def _operand(c: TensorRTContext, value: Any, dtype: ir.DataType) -> Value:
    if isinstance(value, ir.Value):
        return c.cast(value, dtype)
    return (
        c.build.constant(value, np.int64)
        if dtype == ir.DataType.INT64
        else c.cast(c.build.constant(value, np.float32), dtype)
    )


def to_dtype(c: TensorRTContext, node: Node) -> None:
    """Emit the mask of real tokens in the activations' dtype."""
    c.set(node, c.as_activation(c.value(args_of(node)[0])))


def narrow(c: TensorRTContext, node: Node) -> None:
    """Emit the call's tokens of a value that has a column for each of the keys' buffer; else a slice."""
    x = args_of(node)[0]
    if x.meta["val"].dim() != 2:
        return common.narrow(c, node)
    return c.set(node, c.build.op("GatherElements", c.value(x), _columns(c), axis=1))


def _columns(c: TensorRTContext) -> Value:
    """Return the column of the keys' buffer of each token of the call, int64 [batch, seq]."""
    return c.build.once("columns", lambda: _written(c))


def _written(c: TensorRTContext) -> Value:
    b = c.build
    (ids,) = [node for node in c.program.graph.nodes if c.program.inputs.get(node.name) == INPUT_IDS]
    seq = b.op("Squeeze", b.op("Shape", c.value(ids), start=1, end=2))
    tokens = b.op("Range", b.constant(0, np.int64), seq, b.constant(1, np.int64))
    return b.op("Add", b.op("Unsqueeze", c.write_indices, b.ints(1)), tokens)


def causal_conv(c: TensorRTContext, node: Node) -> None:
    """Emit the plugin's CausalConv, which always takes a bias."""
    x, state, weight, bias = args_of(node)
    zeros = np.zeros(size_of(weight, 0))
    added = c.as_activation(c.build.constant(zeros, np.float32)) if bias is None else c.value(bias)
    c.set(node, *c.build.ops("CausalConv", 2, c.value(x), c.value(state), c.value(weight), added, **PLUGIN))


def ssm_scan(c: TensorRTContext, node: Node) -> None:
    """Emit the plugin's SSMScan; A, D, dt_bias and the state are float32."""
    x, dt, A, B, C, D, dt_bias, state, mask, chunk_size, dt_min, dt_max = args_of(node)
    decay, skip, bias = (c.exact(c.expr(weight)) for weight in (A, D, dt_bias))
    operands = [c.value(x), c.value(dt), decay, c.value(B), c.value(C), skip, bias, c.value(state), c.value(mask)]
    limits = {"chunk_size": chunk_size, "dt_min": float(dt_min), "dt_max": float(dt_max)}
    c.set(node, *c.build.ops("SSMScan", 2, *operands, **PLUGIN, **limits))


def attention(c: TensorRTContext, node: Node) -> None:
    """Emit the rotary embedding, the call's keys and values written into their buffers, and attention over all."""
    q, k, v, past_k, past_v, _positions, mask, _theta = args_of(node)
    b = c.build
    cos, sin = rotary_tables(c, node)
    visible = b.once((mask, "visible"), lambda: _visible(c, mask))
    query, new_k, new_v = (b.op("Transpose", c.value(x), perm=[0, 2, 1, 3]) for x in (q, k, v))
    query, new_k = (b.op("RotaryEmbedding", x, cos, sin) for x in (query, new_k))
    keys, values = (
        b.op("TensorScatter", c.value(past), new, c.write_indices, axis=2)
        for past, new in ((past_k, new_k), (past_v, new_v))
    )
    out = b.op("Attention", query, keys, values, visible, scale=AttentionSizes.of(node).scale)
    c.set(node, b.op("Transpose", out, perm=[0, 2, 1, 3]), keys, values)


def _visible(c: TensorRTContext, mask: Any) -> Value:
    """Return bool [batch, 1, seq, max_context]: the keys that each query sees."""
    b = c.build
    own = b.op("Unsqueeze", _columns(c), b.ints(2))
    column = b.constant(np.arange(c.max_context), np.int64)
    return b.op("Unsqueeze", visible_keys(c, mask, column, own=own), b.ints(1))


TABLE: Mapping[Any, Emitter[TensorRTContext]] = {
    **common.TABLE,
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.rms_norm.default: rms_norm,
    aten.silu.default: silu,
    aten.add.Tensor: binary("Add"),
    aten.sub.Tensor: binary("Sub"),
    aten.mul.Tensor: binary("Mul"),
    aten.narrow.default: narrow,
    aten.to.dtype: to_dtype,
}
