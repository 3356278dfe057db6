"""What graphs of a Mamba-2 layer share: the scan's step sizes, its skip connection, the convolution's products.

Source: Dao and Gu, "Transformers are SSMs" (2024), sections 3 and 5.2; ``plugins/ssm_scan/op.py`` is the reference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.fx import Node

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.program import args_of
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context


def step_sizes(c: Context, scan: Node) -> Value:
    """Return float32 [batch, seq, heads]: clamp(softplus(dt + dt_bias)) of an h1.ssm_scan, and 0 for pads."""
    _x, dt, _A, _B, _C, _D, dt_bias, _state, mask, _chunk, dt_min, dt_max = args_of(scan)
    b = c.build
    step = b.op("Softplus", b.op("Add", c.as_float32(c.value(dt)), c.exact(c.expr(dt_bias))))
    if (dt_min, dt_max) != (0.0, math.inf):
        high = None if dt_max == math.inf else b.constant(dt_max, np.float32)
        step = b.op("Clip", step, b.constant(dt_min, np.float32), high)
    real = b.once((mask, "column"), lambda: c.as_float32(b.op("Unsqueeze", c.value(mask), b.ints(2))))
    return b.op("Mul", step, real)


def drive(c: Context, x: Value, step: Value) -> Value:
    """Return dt x, [batch, seq, heads, d_head], of the float32 x and the steps [batch, seq, heads]."""
    return c.build.op("Mul", x, c.build.op("Unsqueeze", step, c.build.ints(3)))


def log_decay(c: Context, A: Any, step: Value) -> Value:
    """Return dt A, float32 [batch, seq, heads], of the weight A [heads]."""
    return c.build.op("Mul", step, c.exact(c.expr(A)))


def skip(c: Context, x: Value, D: Any) -> Value:
    """Return D x, [batch, seq, heads, d_head], of the float32 x and the weight D [heads]."""
    return c.build.op("Mul", x, c.build.op("Unsqueeze", c.exact(c.expr(D)), c.build.ints(1)))


def conv_taps(c: Context, weight: WeightExpr) -> ir.ExternalTensor:
    """Write a convolution's weight [channels, 1, taps] as [taps, channels], with channels last like its input."""
    channels, _, taps = weight.shape(c.store.shape)
    return c.computed_tensor(f"{weight.only.tensor}.taps", (taps, channels), lambda: weight.dense(c.store)[:, 0].T)


def shifted_products(c: Context, conv: Node) -> tuple[Value, Value]:
    """Return the convolution of an h1.causal_conv before its SiLU, by products with shifted inputs, and the new state.

    The convolution is float32, and the state has the activations' dtype.

    This takes the place of CausalConvWithState, whose CPU kernel is scalar (4 times slower at 512 tokens), and of Conv
    (20 times slower at one token).
    """
    x, state, weight, bias = args_of(conv)
    taps = conv_taps(c, c.expr(weight))
    count, channels = taps.shape.numpy()
    row_bytes = (taps.length or 0) // count
    joined = c.build.op("Concat", c.value(state), c.value(x), axis=1)
    inputs = c.as_float32(joined)

    def window(values: Value, first: int, end: int) -> Value:
        return c.build.op("Slice", values, c.build.ints(first), c.build.ints(end), c.build.ints(1))

    total = None if bias is None else c.exact(c.expr(bias))
    for tap in range(count):
        end = np.iinfo(np.int64).max if tap == count - 1 else tap + 1 - count
        row = c.build.initializer(c.data.alias(f"{taps.name}.{tap}", (channels,), taps, start=tap * row_bytes))
        product = c.build.op("Mul", window(inputs, tap, end), row)
        total = product if total is None else c.build.op("Add", total, product)
    assert total is not None
    return total, window(joined, 1 - count, np.iinfo(np.int64).max)
