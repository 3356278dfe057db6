"""Verify a Program before targets receive it: LEGAL_OPS is the whole vocabulary that a target must know."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from h1export.graphs.program import Program
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.plugins import h1

aten = torch.ops.aten

LEGAL_OPS = frozenset(
    {
        h1.ssm_scan.default,
        h1.causal_conv.default,
        h1.attention.default,
        aten.cat.default,
        aten.embedding.default,
        aten.linear.default,
        aten.rms_norm.default,
        aten.silu.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.cumsum.default,
        aten.clamp.default,
        aten.index_select.default,
        aten.narrow.default,
        aten.split_with_sizes.default,
        aten.to.dtype,
        aten.unsqueeze.default,
        aten.view.default,
        aten.sym_size.int,  # sizes: integers, not tensors
        operator.sub,
        operator.getitem,  # outputs of split_with_sizes and of the h1 ops
    }
)


class VerifyError(Exception):
    """A program breaks a rule that targets rely on: a bug in the front end, not bad input."""


def verify(program: Program) -> None:
    """Raise VerifyError unless every op is legal and every input, weight and output is accounted for."""
    shapes = tensor_shapes(program.config)
    _check_io(program)
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            read |= _placeholder(program, node)
        elif node.op == "call_function":
            if node.target not in LEGAL_OPS:
                raise VerifyError(f"{node}: {node.target} is not a legal op; decompose it in the model or in a pass")
        elif node.op == "output":
            if len(node.args[0]) != len(program.outputs):
                raise VerifyError(f"{len(node.args[0])} outputs for the names {program.outputs}")
        else:
            raise VerifyError(f"{node}: weights do not live inside a program ({node.op})")
    if read != set(shapes):
        raise VerifyError(f"tensors that no initializer is made of, or unknown ones: {sorted(read ^ set(shapes))}")


def _check_io(program: Program) -> None:
    """Check that ids, mask and every state are inputs, and logits and every state are outputs."""
    tensors = program.states.tensors
    inputs = {INPUT_IDS, ATTENTION_MASK, *(t.past for t in tensors)}
    outputs = (LOGITS, *(t.present for t in tensors))
    placeholders = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    found = {name for node, name in program.inputs.items() if node in placeholders}
    if found != inputs:
        raise VerifyError(f"inputs missing or unknown: {sorted(found ^ inputs)}")
    if program.outputs != outputs:
        what = sorted(set(program.outputs) ^ set(outputs)) or f"none, but their order is {program.outputs}"
        raise VerifyError(f"outputs missing or unknown: {what}")


def _placeholder(program: Program, node: Node) -> set[str]:
    """Check that something reads a placeholder and that its shape is its expression's; return the tensors behind it."""
    expr = program.weights.get(node.name)
    if node.name in program.orders:
        return set()
    if node.name not in program.inputs and expr is None:
        raise VerifyError(f"{node}: neither an input nor a weight")
    if not node.users:
        made_of = program.inputs.get(node.name) or [part.tensor for part in (expr.parts if expr else ())]
        raise VerifyError(f"{node}: nothing reads it ({made_of})")
    if expr is None:
        return set()
    shape = expr.shape(tensor_shapes(program.config).__getitem__)
    if tuple(node.meta["val"].shape) != shape:
        raise VerifyError(f"{node}: the graph says {tuple(node.meta['val'].shape)}, its expression {shape}")
    return {part.tensor for part in expr.parts}
