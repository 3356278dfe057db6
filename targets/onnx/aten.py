"""Emitters for the ATen ops whose ONNX form is the same for every target, and the table that targets extend.

Sizes (torch.SymInt) are 1-D int64 tensors of one element.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.graphs.passes.base import linear_bias
from h1export.graphs.program import args_of
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context, Emitter

aten = torch.ops.aten


def _number(c: Context, node: Node, number: Any) -> Value:
    """Return a constant beside ``node``'s tensors: an integer, or an activation."""
    if node.meta["val"].dtype == torch.int64:
        return c.build.constant(number, np.int64)
    return c.build.once(("number", number), lambda: c.as_activation(c.build.constant(number, np.float32)))


def binary(op_type: str) -> Emitter[Context]:
    """Return the emitter of an elementwise op of two tensors, or of a tensor and a number."""

    def emit(c: Context, node: Node) -> None:
        a, b = (c.value(arg) if isinstance(arg, Node) else _number(c, node, arg) for arg in args_of(node))
        c.set(node, c.build.op(op_type, a, b))

    return emit


def _size(c: Context, arg: Any) -> Value:
    return c.value(arg) if isinstance(arg, Node) else c.build.ints(arg)


def size_sub(c: Context, node: Node) -> None:
    """Emit the difference of two sizes."""
    c.set(node, c.build.op("Sub", _size(c, args_of(node)[0]), _size(c, args_of(node)[1])))


def size(c: Context, node: Node) -> None:
    """Emit aten.sym_size, the length of one axis."""
    x, axis = args_of(node)
    c.set(node, c.build.op("Shape", c.value(x), start=axis, end=int(axis) + 1))


def getitem(c: Context, node: Node) -> None:
    """Bind the node to one of several outputs."""
    c.set(node, c.item(args_of(node)[0], int(args_of(node)[1])))


def cumsum(c: Context, node: Node) -> None:
    """Emit aten.cumsum."""
    x, axis = args_of(node)
    c.set(node, c.build.op("CumSum", c.value(x), c.build.constant(axis, np.int64)))


def clamp(c: Context, node: Node) -> None:
    """Emit aten.clamp(x, min)."""
    x, low = args_of(node)
    c.set(node, c.build.op("Clip", c.value(x), _number(c, node, low)))


def narrow(c: Context, node: Node) -> None:
    """Emit aten.narrow(x, axis, start, length), whose start and length may be sizes."""
    x, axis, start, length = args_of(node)
    first = _size(c, start)
    count = _size(c, length)
    c.set(node, c.build.op("Slice", c.value(x), first, c.build.op("Add", first, count), c.build.ints(int(axis))))


def split(c: Context, node: Node) -> None:
    """Emit aten.split_with_sizes, a value for each part."""
    x, sizes, axis = args_of(node)
    c.set(node, *c.build.ops("Split", len(sizes), c.value(x), c.build.ints(*sizes), axis=axis))


def index_select(c: Context, node: Node) -> None:
    """Emit a gather along one axis."""
    x, axis, index = args_of(node)
    c.set(node, c.build.op("Gather", c.value(x), c.value(index), axis=axis))


def cat(c: Context, node: Node) -> None:
    """Emit aten.cat."""
    tensors, axis = args_of(node)
    c.set(node, c.build.op("Concat", *(c.value(tensor) for tensor in tensors), axis=axis))


def to_dtype(c: Context, node: Node) -> None:
    """Emit aten.to.dtype to float32, which the graph's activations stand for."""
    c.set(node, c.build.op("Cast", c.value(args_of(node)[0]), to=int(ir.DataType.from_numpy(np.dtype(c.activations)))))


def unsqueeze(c: Context, node: Node) -> None:
    """Emit aten.unsqueeze."""
    x, axis = args_of(node)
    c.set(node, c.build.op("Unsqueeze", c.value(x), c.build.ints(int(axis))))


def view(c: Context, node: Node) -> None:
    """Emit a reshape whose dynamic dims stay where they are."""
    x = args_of(node)[0]
    assert isinstance(x, Node)
    before = x.meta["val"].shape
    after = node.meta["val"].shape
    dims = [dim if isinstance(dim, int) else 0 for dim in after]  # 0: as in the input
    for axis, dim in enumerate(after):
        if not isinstance(dim, int) and (axis >= len(before) or before[axis] != dim):
            raise NotImplementedError(f"{node}: dynamic dim {axis} moves in a view")
    c.set(node, c.build.op("Reshape", c.value(x), c.build.ints(*dims)))


def set_product(c: Context, node: Node, product: Value) -> None:
    """Bind an aten.linear to its ``product``, with the bias added where it has one."""
    bias = linear_bias(node)
    c.set(node, product if bias is None else c.build.op("Add", product, c.value(bias)))


TABLE: Mapping[Any, Emitter[Any]] = {
    aten.add.Tensor: binary("Add"),
    aten.sub.Tensor: binary("Sub"),
    aten.mul.Tensor: binary("Mul"),
    aten.cat.default: cat,
    aten.cumsum.default: cumsum,
    aten.index_select.default: index_select,
    aten.clamp.default: clamp,
    aten.narrow.default: narrow,
    aten.split_with_sizes.default: split,
    aten.to.dtype: to_dtype,
    aten.unsqueeze.default: unsqueeze,
    aten.view.default: view,
    aten.sym_size.int: size,
    operator.sub: size_sub,
    operator.getitem: getitem,
}
