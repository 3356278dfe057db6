"""Find the probes of a Program (model/falcon_h1/probes.py) by the ops that read or compute them.

This way a probe stays at its place in the model when passes rewrite the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from h1export.graphs.program import Program, args_of
from h1export.model.falcon_h1.probes import ProbePoint, probe_name
from h1export.model.falcon_h1.projections import FINAL_NORM, IN_PROJ, POINTS_READ
from h1export.model.falcon_h1.tensors import split_layer
from h1export.plugins import h1

aten = torch.ops.aten

UP_TO_PROJECTION = (aten.view.default, aten.mul.Tensor, aten.split_with_sizes.default, operator.getitem)


def probes(program: Program) -> dict[str, Node]:
    """Returns probe -> the node that has its value, heads side by side or apart."""
    found: dict[str, Node] = {}
    for node in program.calls(aten.rms_norm.default, aten.linear.default):
        for tensor, x in _read(program, node):
            if tensor == FINAL_NORM:
                found[probe_name(program.config.num_hidden_layers, ProbePoint.RESIDUAL)] = _unviewed(x)
                continue
            layer, name = split_layer(tensor)
            point = POINTS_READ.get(name.removesuffix(".weight"))
            if layer is not None and point is not None:
                found[probe_name(layer, point)] = _unviewed(x)
    for layer, node in enumerate(program.calls(h1.causal_conv.default)):
        found[probe_name(layer, ProbePoint.CONV_INPUT)] = _unviewed(args_of(node)[0])
        (conv,) = [user for user in node.users if user.args[1] == 0]
        found[probe_name(layer, ProbePoint.CONV)] = conv
    for layer, node in enumerate(program.calls(h1.ssm_scan.default)):
        found[probe_name(layer, ProbePoint.DT)] = _unviewed(args_of(node)[1])
    for layer, node in enumerate(program.calls(h1.attention.default)):
        for point, x in zip((ProbePoint.QUERY, ProbePoint.KEY, ProbePoint.VALUE), node.args, strict=False):
            found[probe_name(layer, point)] = _unviewed(x)
    for node in program.calls(aten.silu.default):
        if (layer_of_gate := _in_proj_layer(program, args_of(node)[0])) is not None:
            found[probe_name(layer_of_gate, ProbePoint.GATE)] = _unviewed(args_of(node)[0])
    return found


def _read(program: Program, node: Node) -> Iterator[tuple[str, Any]]:
    """Yield (checkpoint tensor, node that is multiplied by it) for a norm or an aten.linear.

    Tensors side by side in one weight (axis 1) each have an input of their own, a part of the concatenated input.
    """
    norm = node.target is aten.rms_norm.default
    x = node.args[0]
    expr = program.weight_of(node.args[2 if norm else 1])
    if expr is None:
        return
    if len(expr.parts) > 1 and expr.axis == 1:
        yield from zip((part.tensor for part in expr.parts), args_of(x)[0], strict=True)
    else:
        yield from ((part.tensor, x) for part in expr.parts)


def _unviewed(node: Any) -> Node:
    """Returns the value before it was viewed as heads and before its columns were sorted.

    A target may leave out either op.
    """
    while node.target in (aten.view.default, aten.index_select.default):
        node = node.args[0]
    assert isinstance(node, Node)
    return node


def _in_proj_layer(program: Program, node: Any) -> int | None:
    """Returns the layer whose in_proj computes ``node``; None: something else does."""
    while node.target in UP_TO_PROJECTION:
        node = node.args[0]
    if node.target is not aten.linear.default:
        return None
    expr = program.weight_of(node.args[1])
    found = [split_layer(part.tensor) for part in (expr.parts if expr else ())]
    return next((layer for layer, name in found if name == IN_PROJ.weight), None)
