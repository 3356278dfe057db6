"""The graph of --graph cuda: fp16 activations, keys and values; the scan and its state in float32.

Every operator here has a kernel of these dtypes in ONNX Runtime's CUDA provider: its docs/OperatorKernels.md, repeated for what this
graph uses in tests/targets/onnxruntime/test_cuda.py. bf16 activations are not offered: MatMulNBits takes scales in the activations'
dtype, and bf16 cannot hold the fp16 scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.errors import H1ExportError
from h1export.graphs.program import args_of
from h1export.model.falcon_h1.states import Array
from h1export.plugins import h1
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Emitter, initializer_name
from h1export.targets.onnxruntime.emit.cpu import TABLE as CPU_TABLE
from h1export.targets.onnxruntime.emit.nbits import (
    FLOAT,
    MS,
    OrtContext,
    factors,
    gather_block_quantized,
    matmul_nbits,
    store,
)

aten = torch.ops.aten


class CudaContext(OrtContext):
    """fp16 activations. Small weights are stored in float32 and rounded when a session is made; matrices are stored in fp16."""

    activations = np.float16

    def weight(self, expr: WeightExpr) -> Value:
        return self.build.once((expr, "half"), lambda: self.as_activation(self.exact(expr)))  # type: ignore[no-any-return]

    def exact(self, expr: WeightExpr) -> Value:
        """``expr`` in float32, as the scan takes its weights."""
        return super().weight(expr)

    def matrix(self, expr: WeightExpr) -> Value:
        """``expr`` in fp16, written once. Raises H1ExportError for values beyond it."""
        return self.build.once((expr, "matrix"), lambda: self.build.initializer(self._write_half(expr)))  # type: ignore[no-any-return]

    def _write_half(self, expr: WeightExpr) -> ir.ExternalTensor:
        name = initializer_name(expr)
        tensor = self.data.place(name, ir.DataType.FLOAT16, expr.shape(self.store.shape))
        self.data.fill([tensor], (partial(_half, name, block) for block in expr.lazy_blocks(self.store, BLOCK_BYTES)))
        return tensor


def _half(name: str, block: Callable[[], Array]) -> tuple[npt.NDArray[np.float16]]:
    values = block()
    if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise H1ExportError(f'weights "{name}"', "hold values beyond fp16", "use --graph cpu")
    return (values.astype(np.float16),)


def linear(c: CudaContext, node: Node) -> None:
    """The scales in fp16 as the integer rule has them, so µP multiplies the product, row by row."""
    x = c.value(args_of(node)[0])
    expr = c.expr(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        y = c.build.op("FusedMatMul", x, c.matrix(expr), domain=MS, transB=1)
    else:
        y = matmul_nbits(c, x, expr, precision=precision)
        multiplier = factors(c, expr)
        y = y if multiplier is None else c.build.op("Mul", y, c.as_activation(multiplier))
    bias = args_of(node)[2] if len(args_of(node)) > 2 else None
    c.set(node, y if bias is None else c.build.op("Add", y, c.value(bias)))


def embedding(c: CudaContext, node: Node) -> None:
    """GatherBlockQuantized for int4 and int8; a tied head reads the same bytes."""
    expr = c.expr(args_of(node)[0])
    ids = c.value(args_of(node)[1])
    precision = c.precision(expr)
    if precision is None:
        return c.set(node, c.build.op("Gather", c.matrix(expr), ids))
    stored = store(c, expr, precision)
    layout = stored.layout
    rows = gather_block_quantized(c, ids, expr, stored=stored, scales=c.build.initializer(stored.scales))
    if layout.blocks * layout.block != layout.columns:
        rows = c.build.op("Slice", rows, c.build.ints(0), c.build.ints(layout.columns), c.build.ints(2))
    return c.set(node, rows)


def causal_conv(c: CudaContext, node: Node) -> None:
    """One kernel, SiLU included."""
    x, state, weight, bias = args_of(node)
    operands = [c.value(x), c.value(weight), None if bias is None else c.value(bias), c.value(state)]
    c.set(node, *c.build.ops("CausalConvWithState", 2, *operands, domain=MS, activation="silu", channels_last=1))


def ssm_scan(c: CudaContext, node: Node) -> None:
    """GatedDeltaNet without the delta: query C, key B, value dt x, decay dt A, all float32.

    Its state is float32 whatever the rest is; LinearAttention's has the activations' dtype and would drift. With fp16 inputs it may
    choose a kernel that rounds inside a chunk.
    """
    x, dt, A, B, C, D, dt_bias, state, mask, _chunk, dt_min, dt_max = args_of(node)
    b = c.build
    step = b.op("Softplus", b.op("Add", b.op("Cast", c.value(dt), to=FLOAT), c.exact(c.expr(dt_bias))))
    if (dt_min, dt_max) != (0.0, math.inf):
        high = None if dt_max == math.inf else b.constant(dt_max, np.float32)
        step = b.op("Clip", step, b.constant(dt_min, np.float32), high)
    step = b.op(
        "Mul",
        step,
        b.once((mask, "column"), lambda: b.op("Cast", b.op("Unsqueeze", c.value(mask), b.ints(2)), to=FLOAT)),
    )
    exact, query, key = (b.op("Cast", c.value(value), to=FLOAT) for value in (x, C, B))
    drive = b.op("Mul", exact, b.op("Unsqueeze", step, b.ints(3)))
    operands = [query, key, drive, None, b.op("Mul", step, c.exact(c.expr(A))), None, c.value(state)]
    y, new_state = b.ops("GatedDeltaNet", 2, *operands, domain=MS, update_rule="gated", scale=1.0)
    skip = b.op("Mul", exact, b.op("Unsqueeze", c.exact(c.expr(D)), b.ints(1)))
    c.set(node, c.as_activation(b.op("Add", y, skip)), new_state)


TABLE: dict[Any, Emitter[Any]] = CPU_TABLE | {
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
}
