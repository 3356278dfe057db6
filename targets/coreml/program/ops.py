"""One emitter for each op of a Program: MIL operations for one function of the package."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.passes.base import linear_bias
from h1export.graphs.program import args_of
from h1export.plugins import h1
from h1export.targets.coreml.program.attention import attention
from h1export.targets.coreml.program.context import ALL_REAL, Context
from h1export.targets.coreml.program.scan import causal_conv, ssm_scan
from h1export.targets.coreml.program.weights import Var

aten = torch.ops.aten

Emitter = Callable[[Context, Node], None]


def linear(c: Context, node: Node) -> None:
    """Emit a product with integers and µP behind it, or with floats into which µP is folded."""
    x = c.value(args_of(node)[0])
    expr = c.expr(args_of(node)[1])
    bias = {} if (added := linear_bias(node)) is None else {"bias": c.value(added)}
    multiplier = None if c.weights.precision(expr) is None else c.weights.multiplier(expr.only)
    if multiplier is None:
        return c.set(node, c.op("linear", x=x, weight=_matrix(c, expr), **bias))
    y = c.op("mul", x=c.op("linear", x=x, weight=_matrix(c, expr)), y=multiplier)
    return c.set(node, c.op("add", x=y, y=bias["bias"]) if bias else y)


def _matrix(c: Context, expr: WeightExpr) -> Var:
    precision = c.weights.precision(expr)
    return c.once(expr, lambda: c.weights.dense(expr) if precision is None else c.weights.quantized(expr, precision))


def embedding(c: Context, node: Node) -> None:
    """Emit rows of the embedding in float32, as the residual stream stays: sums over layers leave fp16's range."""
    table = _matrix(c, c.expr(args_of(node)[0]))
    ids = c.value(args_of(node)[1])
    c.set(node, c.float32(c.op("gather", x=table, indices=ids, axis=0, validate_indices=False)))


def rms_norm(c: Context, node: Node) -> None:
    """Emit a norm in float32: a square leaves the range of fp16 from 256 on."""
    x, _shape, weight, epsilon = args_of(node)
    wide = c.float32(c.value(x))
    mean = c.op("reduce_mean", x=c.op("mul", x=wide, y=wide), axes=[-1], keep_dims=True)
    inverse = c.op("rsqrt", x=c.op("add", x=mean, y=np.float32(epsilon)), epsilon=np.float32(0))
    normed = c.activation(c.op("mul", x=wide, y=inverse))
    c.set(node, normed if weight is None else c.op("mul", x=normed, y=c.value(weight)))


def binary(op_type: str) -> Emitter:
    """Return the emitter of an elementwise op of tensors, or a tensor and a number, as wide as the widest tensor."""

    def emit(c: Context, node: Node) -> None:
        x, y = (c.value(argument) for argument in args_of(node))
        c.set(node, x if y is ALL_REAL else c.op(op_type, **c.as_wide(x, y)))

    return emit


def silu(c: Context, node: Node) -> None:
    """Emit aten.silu."""
    c.set(node, c.op("silu", x=c.value(args_of(node)[0])))


def view(c: Context, node: Node) -> None:
    """Emit a reshape to the node's shape in this function."""
    c.set(node, c.op("reshape", x=c.value(args_of(node)[0]), shape=c.shape(node)))


def unsqueeze(c: Context, node: Node) -> None:
    """Emit aten.unsqueeze."""
    x = c.value(args_of(node)[0])
    axis = args_of(node)[1]
    c.set(node, x if x is ALL_REAL else c.op("expand_dims", x=x, axes=[axis]))


def split(c: Context, node: Node) -> None:
    """Emit aten.split_with_sizes, a value for each part."""
    x, sizes, *axis = args_of(node)
    c.set(node, *c.op("split", x=c.value(x), split_sizes=tuple(sizes), axis=axis[0] if axis else 0))


def getitem(c: Context, node: Node) -> None:
    """Bind the node to one of several outputs."""
    c.set(node, c.value(args_of(node)[0])[args_of(node)[1]])


def index_select(c: Context, node: Node) -> None:
    """Emit a gather along one axis."""
    x, axis, index = args_of(node)
    c.set(node, c.op("gather", x=c.value(x), indices=c.value(index), axis=axis, validate_indices=False))


def last_token(c: Context, node: Node) -> None:
    """Emit narrow in a program with one position's logits: the last token, of a padded call the last real one."""
    x = c.value(args_of(node)[0])
    if c.n_valid is None:
        return c.set(node, x)
    index = c.op("sub", x=c.n_valid, y=np.int32(1))
    return c.set(node, c.op("gather", x=x, indices=index, axis=1, validate_indices=False))


TABLE: Mapping[Any, Emitter] = {
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.rms_norm.default: rms_norm,
    aten.silu.default: silu,
    aten.add.Tensor: binary("add"),
    aten.index_select.default: index_select,
    aten.mul.Tensor: binary("mul"),
    aten.narrow.default: last_token,
    aten.split_with_sizes.default: split,
    aten.unsqueeze.default: unsqueeze,
    aten.view.default: view,
    operator.getitem: getitem,
}

# legal ops that occur only in fusions, or where this target sets a value of its own: positions, real tokens, sizes
UNUSED = frozenset(
    {
        aten.cat.default,
        aten.sub.Tensor,
        aten.cumsum.default,
        aten.clamp.default,
        aten.to.dtype,
        aten.sym_size.int,
        operator.sub,
    }
)
