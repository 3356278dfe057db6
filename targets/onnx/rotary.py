"""The rotary embedding's tables, which depend on positions alone, so that all layers share them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.plugins.attention.op import rope_frequencies
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context
from h1export.targets.sizes import AttentionSizes


def rotary_tables(c: Context, attention: Node, *new_axes: int) -> tuple[Value, Value]:
    """Return cos and sin of an h1.attention's positions, [batch, seq, dim / 2], in the activations' dtype.

    They are computed for just the positions of the call: a table for 256K positions would be 134 MB. ``new_axes``:
    where to insert axes of length 1, behind [batch, seq] or further; by default the one that becomes dim / 2.
    """
    *_, positions, _mask, theta = args_of(attention)
    dim = AttentionSizes.of(attention).head_dim
    return c.build.once((positions, theta), lambda: _tables(c, positions, theta, dim=dim, axes=new_axes or (2,)))


def _tables(c: Context, positions: Any, theta: float, *, dim: int, axes: tuple[int, ...]) -> tuple[Value, Value]:
    frequencies = rope_frequencies(theta, dim)
    position = c.build.op("Unsqueeze", c.cast(c.value(positions), ir.DataType.FLOAT), c.build.ints(*axes))
    angles = c.build.op("Mul", position, c.build.constant(frequencies.numpy(), np.float32))
    return c.as_activation(c.build.op("Cos", angles)), c.as_activation(c.build.op("Sin", angles))
