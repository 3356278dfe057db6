"""The graph over our own kernels, where it differs from the one for stock kernels: one op for each h1 op.

The ops read their columns out of the wide products that hold them. Every op is described where it is computed, in csrc.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from h1export.graphs.passes.base import linear_bias
from h1export.graphs.program import Program, args_of
from h1export.model.falcon_h1.probes import Columns
from h1export.plugins import h1
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Emitter
from h1export.targets.onnx.mamba import conv_taps
from h1export.targets.onnx.rotary import rotary_tables
from h1export.targets.onnxruntime.emit import cpu as stock
from h1export.targets.onnxruntime.emit.matmul_nbits import (
    OrtContext,
    product_attributes,
    row_multipliers,
    write_quantized,
)
from h1export.targets.sizes import AttentionSizes, ScanSizes, size_of

DOMAIN = "h1export"
# kLanes and kMostTaps of csrc
LANES = 8
MOST_TAPS = 8

aten = torch.ops.aten


def covers(program: Program) -> bool:
    """Whether our kernels take the sizes of ``program``: heads of whole vectors, and convolutions of few taps."""
    heads = [AttentionSizes.of(node).head_dim for node in program.calls(h1.attention.default)]
    taps = [size_of(args_of(node)[2], 2) for node in program.calls(h1.causal_conv.default)]
    return all(dim % LANES == 0 for dim in heads) and all(count <= MOST_TAPS for count in taps)


class NativeContext(OrtContext):
    """A Context in which heads are no axis: [batch, seq, heads, dim] of the Program stays [batch, seq, heads * dim].

    Attributes:
        gated_by_scan: gates that an SSMScan has applied already.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gated_by_scan: set[Node] = set()

    def op(self, op_type: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Append one of our own ops with one output."""
        return self.build.op(op_type, *inputs, domain=DOMAIN, **attributes)

    def ops(self, op_type: str, outputs: int, *inputs: Value | None, **attributes: Any) -> tuple[Value, ...]:
        """Append one of our own ops with several outputs."""
        return self.build.ops(op_type, outputs, *inputs, domain=DOMAIN, **attributes)

    def columns(self, node: Any) -> tuple[Value, int]:
        """Return (wide, offset): the value that holds the flattened ``node`` in its last axis, and the first column."""
        while node.target is aten.view.default:
            node = node.args[0]
        if node.target is operator.getitem and args_of(node)[0].target is aten.split_with_sizes.default:
            split, index = args_of(node)
            whole, sizes, _ = args_of(split)
            return self.value(whole), sum(sizes[:index])
        return self.value(node), 0

    def probed(self, node: Node) -> tuple[Value, Columns | None]:
        """Return the wide product that holds the probe: our ops read its columns, and nothing splits it."""
        inner, _ = _unmasked(node)
        wide, offset = self.columns(inner)
        return wide, None if wide is self.value(inner) else (offset, offset + node.meta["val"].shape[2:].numel())

    def side_by_side(self, *nodes: Any) -> tuple[Value, list[int]]:
        """Return (wide, offsets) of several nodes, copied side by side unless one value holds them already."""
        places = [self.columns(node) for node in nodes]
        if len({id(wide) for wide, _ in places}) == 1:
            return places[0][0], [offset for _, offset in places]
        widths = [node.meta["val"].shape[2:].numel() for node in nodes]
        wide = self.build.op(
            "Concat", *(self.build.op("Reshape", self.value(n), self.build.ints(0, 0, -1)) for n in nodes), axis=2
        )
        return wide, [sum(widths[:index]) for index in range(len(nodes))]


@dataclass(frozen=True)
class Product:
    """What the op of a product with integers takes beside x."""

    operands: tuple[Value | None, ...]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, c: NativeContext, node: Node) -> Product | None:
        """Return what aten.linear needs; None: its weight is float32, or has zero points as stock kernels take."""
        expr = c.expr(args_of(node)[1])
        bias = linear_bias(node)
        precision = c.precision(expr)
        if precision is None or precision.zeros:
            return None
        matrix = write_quantized(c, expr, precision)
        weight = c.build.initializer(matrix.codes), c.build.initializer(matrix.scales)
        multipliers = row_multipliers(c, expr) if expr.axis == 0 else None  # linear applies those of columns
        operands = (*weight, multipliers, None if bias is None else c.value(bias))
        return cls(operands, product_attributes(c, expr, matrix))


def linear(c: NativeContext, node: Node) -> None:
    """Emit a product with integers, and with it a gate, or two values side by side, that nothing else reads."""
    x = args_of(node)[0]
    expr = c.expr(args_of(node)[1])
    product = Product.of(c, node)
    if product is None:
        return stock.linear(c, node)
    if expr.axis == 1:
        a_factor, b_factor = (part.multiplier.factor for part in expr.parts)
        sides = (c.value(side) for side in args_of(x)[0])
        scaled = {"a_factor": a_factor, "b_factor": b_factor}
        return c.set(node, c.op("PairQMatMul", *sides, *product.operands, **scaled, **product.attributes))
    gated = _gated(x) if len(x.users) == 1 and x not in c.gated_by_scan else None
    if gated is not None:
        (a, a_offset), (gate, gate_offset) = map(c.columns, gated)
        offsets = {"a_offset": a_offset, "gate_offset": gate_offset}
        return c.set(node, c.op("SiluQMatMul", a, gate, *product.operands, **offsets, **product.attributes))
    return c.set(node, c.op("QMatMul", c.value(x), *product.operands, **product.attributes))


def _gated(node: Node) -> tuple[Node, Node] | None:
    """Return (a, gate) where ``node`` is a * silu(gate)."""
    if node.target is not aten.mul.Tensor or node.meta["val"].dim() != 3:
        return None
    a, gate = args_of(node)
    return (a, args_of(gate)[0]) if isinstance(gate, Node) and gate.target is aten.silu.default else None


def add(c: NativeContext, node: Node) -> None:
    """Emit one op for a sum, the norm that reads it and the product that reads the norm; else the stock sum."""
    norms = [user for user in node.users if user.target is aten.rms_norm.default and args_of(user)[2] is not None]
    products = [user for norm in norms for user in norm.users if user.target is aten.linear.default]
    if len(norms) == len(products) == 1 and len(norms[0].users) == 1:
        (_, _, weight, epsilon) = args_of(norms[0])
        product = Product.of(c, products[0])
        if product is not None:
            operands = (*(c.value(x) for x in args_of(node)), c.value(weight), *product.operands)
            y, total = c.ops("NormQMatMul", 2, *operands, epsilon=epsilon, **product.attributes)
            c.set(node, total)
            return c.set(products[0], y)
    return stock.add(c, node)


def view(c: NativeContext, node: Node) -> None:
    """Emit a reshape, or nothing where the value is flat already."""
    x = args_of(node)[0]
    flat = x.target is operator.getitem and args_of(x)[0].target in (h1.ssm_scan.default, h1.attention.default)
    if flat and node.meta["val"].dim() == 3:
        return c.set(node, c.value(x))
    return common.view(c, node)


def mul(c: NativeContext, node: Node) -> None:
    """Emit one op for a * silu(gate); else the stock product."""
    gated = _gated(node)
    if gated is None:
        return common.binary("Mul")(c, node)
    (x, a_offset), (z, gate_offset) = map(c.columns, gated)
    width = node.meta["val"].shape[-1]
    return c.set(node, c.op("SiluMul", x, z, a_offset=a_offset, gate_offset=gate_offset, width=width))


def causal_conv(c: NativeContext, node: Node) -> None:
    """Emit CausalConv, which applies the mask of pads itself."""
    x, state, weight, bias = args_of(node)
    x, pads = _unmasked(x)
    mask = None if pads is None else c.value(pads)
    wide, offset = c.columns(x)
    taps = c.build.initializer(conv_taps(c, c.expr(weight)))
    added = None if bias is None else c.value(bias)
    c.set(node, *c.ops("CausalConv", 2, wide, c.value(state), taps, added, mask, offset=offset))


def _unmasked(x: Node) -> tuple[Node, Node | None]:
    """Return (x, mask) of a product that zeroes pads; (x, None) of anything else."""
    column = args_of(x)[1] if x.target is aten.mul.Tensor else None
    if isinstance(column, Node) and column.target is aten.unsqueeze.default:
        return args_of(x)[0], args_of(column)[0]
    return x, None


def ssm_scan(c: NativeContext, node: Node) -> None:
    """Emit SSMScan, which applies the gate too where nothing but the gate reads its output."""
    x, dt, A, B, C, D, dt_bias, state, mask, _chunk, dt_min, dt_max = args_of(node)
    sizes = ScanSizes.of(node)
    xbc, offsets = c.side_by_side(x, B, C)
    inner = sizes.heads * sizes.d_head
    assert offsets == [0, inner, inner + sizes.groups * sizes.d_state], "x, B and C are the convolution's output"
    steps, dt_offset = c.columns(dt)
    gated, gate, gate_offset = _gate(c, node)
    outputs = c.ops(
        "SSMScan",
        2,
        xbc,
        steps,
        *(c.value(weight) for weight in (A, D, dt_bias)),
        c.value(state),
        c.value(mask),
        gate,
        heads=sizes.heads,
        groups=sizes.groups,
        d_head=sizes.d_head,
        d_state=sizes.d_state,
        dt_offset=dt_offset,
        gate_offset=gate_offset,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    c.set(node, *outputs)
    if gated is not None:
        c.gated_by_scan.add(gated)
        c.set(gated, outputs[0])


def _gate(c: NativeContext, scan: Node) -> tuple[Node | None, Value | None, int]:
    """Return (y * silu(z), z, offset of z) where only its gate reads the scan's y; else (None, None, 0)."""
    (y,) = [user for user in scan.users if args_of(user)[1] == 0]
    (flat,) = y.users
    if len(flat.users) == 1:
        (product,) = flat.users
        gate = args_of(product)[1] if product.target is aten.mul.Tensor else None
        if isinstance(gate, Node) and gate.target is aten.silu.default:
            return product, *c.columns(args_of(gate)[0])
    return None, None, 0


def attention(c: NativeContext, node: Node) -> None:
    """Emit Attention, rotary embedding and cache included."""
    q, k, v, past_k, past_v, _positions, mask, _theta = args_of(node)
    sizes = AttentionSizes.of(node)
    qkv, (q_offset, k_offset, v_offset) = c.side_by_side(q, k, v)
    operands = [qkv, *rotary_tables(c, node), c.value(mask), c.value(past_k), c.value(past_v)]
    outputs = c.ops(
        "Attention",
        3,
        *operands,
        num_heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        q_offset=q_offset,
        k_offset=k_offset,
        v_offset=v_offset,
        scale=sizes.scale,
    )
    c.set(node, *outputs)


TABLE: Mapping[Any, Emitter[Any]] = {
    **stock.TABLE,
    aten.linear.default: linear,
    aten.add.Tensor: add,
    h1.ssm_scan.default: ssm_scan,
    h1.causal_conv.default: causal_conv,
    h1.attention.default: attention,
    aten.mul.Tensor: mul,
    aten.view.default: view,
}
