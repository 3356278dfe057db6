"""The package's functions, from one Program: fixed shapes, a position instead of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from h1export.graphs.probes import probes
from h1export.graphs.program import Program
from h1export.model.falcon_h1.states import INPUT_IDS
from h1export.plugins import h1
from h1export.targets.coreml import sdk
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.context import ALL_REAL, Context, needed
from h1export.targets.coreml.program.layout import LOGITS, N_VALID, POSITION, Call
from h1export.targets.coreml.program.ops import TABLE
from h1export.targets.coreml.program.states import HeldStates, PassedStates
from h1export.targets.coreml.program.weights import Var, Weights


def mil_program(program: Program, weights: Weights, calls: Sequence[Call], *, max_context: int, state_io: bool) -> Any:
    """Return a MIL program with a function for each of ``calls``; weights are stand-ins."""
    result = sdk.mil().Program()
    for call in calls:
        result.add_function(call.name, _function(program, weights, call, max_context=max_context, state_io=state_io))
    result.default_function_name = calls[0].name
    result.export_as_multifunction = True
    return result


def _function(program: Program, weights: Weights, call: Call, *, max_context: int, state_io: bool) -> Any:
    mb = sdk.builder()
    mil = sdk.mil()
    mb.name_count.clear()  # names come from counters that run on from function to function, and so would the bytes
    states = (PassedStates if state_io else HeldStates)(program.states.tensors, max_context, weights.compute)
    int32 = mil.types.int32
    inputs = {
        layout.INPUT_IDS: mb.placeholder(shape=(1, call.tokens), dtype=int32),
        POSITION: mb.placeholder(shape=(1,), dtype=int32),
    }
    if call.padded:
        inputs[N_VALID] = mb.placeholder(shape=(1,), dtype=int32)
    with mil.Function({**inputs, **states.placeholders()}, opset_version=sdk.coremltools().target.iOS18) as function:
        states.inputs = {name: var for name, var in function.inputs.items() if name not in inputs}
        given = function.inputs
        context = Context(
            program,
            weights,
            states,
            call=call,
            max_context=max_context,
            position=given[POSITION],
            n_valid=given.get(N_VALID),
        )
        logits = _emit(context, given[layout.INPUT_IDS])
        for name, node in probes(program).items():
            context.value(node).name = layout.probe_output(name)
        function.set_outputs([mb.identity(x=logits, name=LOGITS), *states.outputs()])
    return function


def _emit(c: Context, input_ids: Var) -> Var:
    """Emit every node that the logits and states need, and return the logits."""
    for node in c.program.graph.nodes:
        name = c.program.inputs.get(node.name)
        if node.op == "placeholder" and name is not None:
            c.set(node, input_ids if name == INPUT_IDS else None)  # states are read where they are used
    _give(c)
    for node in needed(c.program, lambda node: c.has(node) or c.program.weight_of(node) is not None):
        TABLE[node.target](c, node)
    return c.value(c.program.graph.output_node().args[0][0])  # type: ignore[index]


def _give(c: Context) -> None:
    """Set what the model derives from its mask and this target from its inputs: positions, the real tokens."""
    for node in c.program.calls(h1.attention.default):
        c.set(_argument(node, 5), None)  # the emitter takes positions from the context
    for node in c.program.calls(h1.ssm_scan.default):
        c.set(_argument(node, 8), c.once("real", lambda: _real(c)))


def _argument(node: Node, index: int) -> Node:
    argument = node.args[index]
    assert isinstance(argument, Node)
    return argument


def _real(c: Context) -> Any:
    """Emit the mask of real tokens, [1, T]: 1 for real tokens, 0 for pads."""
    if c.n_valid is None:
        return ALL_REAL
    tokens = np.arange(c.call.tokens, dtype=np.int32)[None]
    return c.activation(c.op("less", x=tokens, y=c.n_valid))
