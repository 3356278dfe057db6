"""The context of emitters: one function of the package, with its inputs, states, weights and values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.program import Program
from h1export.model.falcon_h1.states import INPUT_IDS, StateTensor
from h1export.targets.coreml import sdk
from h1export.targets.coreml.program.layout import Call
from h1export.targets.coreml.program.states import States
from h1export.targets.coreml.program.weights import Float, Var, Weights

MASKED = -3e4  # added to the score of a key that a query does not see: finite in fp16, and nothing after a softmax


class AllReal:
    """A mask of ones: in a function without padding every token is real."""


ALL_REAL = AllReal()


class Context:
    """One function of the package while it is emitted.

    Attributes:
        program: the graph that is emitted.
        weights: the constants of weights.
        states: the reads and writes of states.
        call: the function's name and how many tokens it takes.
        max_context: tokens that the keys and values have room for.
        position: int32 [1], how many tokens came before.
        n_valid: int32 [1], how many of the call's tokens are real; None: all.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        states: States,
        *,
        call: Call,
        max_context: int,
        position: Var,
        n_valid: Var | None,
    ) -> None:
        self.program = program
        self.weights = weights
        self.states = states
        self.call = call
        self.max_context = max_context
        self.position = position
        self.n_valid = n_valid
        self._values: dict[Node, Any] = {}
        self._once: dict[Hashable, Any] = {}
        self._sizes = _Sizes(program, call.tokens, max_context)

    def op(self, op_type: str, **inputs: Any) -> Any:
        """Append an operation of MIL and return its output, or a tuple of them."""
        return getattr(sdk.builder(), op_type)(**inputs)

    def set(self, node: Node, *values: Any) -> None:
        """Bind a node to the value it stands for, or to its tuple of them."""
        self._values[node] = values if len(values) > 1 else values[0]

    def has(self, node: Node) -> bool:
        """Whether the node has a value already."""
        return node in self._values

    def value(self, node: Any) -> Any:
        """Return the value of an emitted node, or the floats of a weight placeholder in the dtype of activations."""
        if isinstance(node, (int, float)):
            return self.weights.compute(node)
        expr = self.program.weight_of(node)
        tensor = self.program.orders.get(node.name)
        if tensor is not None:
            return self.once(self.weights.store.order_name(tensor), lambda: self.weights.order(tensor))
        return self._values[node] if expr is None else self.once(expr, lambda: self.weights.dense(expr))

    def state(self, node: Any) -> StateTensor:
        """Return the state that an input stands for."""
        (tensor,) = [tensor for tensor in self.program.states.tensors if tensor.past == self.program.inputs[node.name]]
        return tensor

    def expr(self, node: Any) -> WeightExpr:
        """Return the expression behind a weight placeholder."""
        expr = self.program.weight_of(node)
        assert expr is not None, f"{node} is not a weight"
        return expr

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what ``make()`` returned the first time in this function."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the node's shape in this function."""
        return tuple(map(self._sizes, node.meta["val"].shape))

    def cast(self, x: Var, dtype: Float) -> Var:
        """Return ``x`` in ``dtype``, by a cast where it has another."""
        name = {np.float16: "fp16", np.float32: "fp32"}[dtype]
        return x if x.dtype == getattr(sdk.mil().types, name) else self.op("cast", x=x, dtype=name)

    def activation(self, x: Var) -> Var:
        """Return ``x`` in the dtype of activations."""
        return self.cast(x, self.weights.compute)

    def float32(self, x: Var) -> Var:
        """Return ``x`` in float32."""
        return self.cast(x, np.float32)

    def as_wide(self, x: Any, y: Any) -> dict[str, Any]:
        """Return operands x and y of a binary op, in float32 where one of them is; numbers take the tensor's dtype."""
        wide = any(getattr(operand, "dtype", None) == sdk.mil().types.fp32 for operand in (x, y))
        return {"x": x, "y": y} if not wide else {"x": self._wide(x), "y": self._wide(y)}

    def _wide(self, operand: Any) -> Any:
        return np.float32(operand) if isinstance(operand, np.floating) else self.float32(operand)


class _Sizes:
    """The numbers behind the symbols of traced shapes in a function: one sequence, its tokens, the keys before them."""

    def __init__(self, program: Program, tokens: int, past: int) -> None:
        placeholders = {program.inputs[node.name]: node for node in program.graph.nodes if node.name in program.inputs}
        batch, seq = placeholders[INPUT_IDS].meta["val"].shape
        growing = next(tensor for tensor in program.states.tensors if tensor.kind.grows)
        keys = placeholders[growing.past].meta["val"].shape
        self._numbers = {batch.node.expr: 1, seq.node.expr: tokens, keys[2].node.expr: past}

    def __call__(self, size: Any) -> int:
        return size if isinstance(size, int) else int(size.node.expr.subs(self._numbers))


def needed(program: Program, given: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield the nodes to emit for the outputs, in graph order, except sizes and what only ``given`` nodes need."""
    (result,) = [node for node in program.graph.nodes if node.op == "output"]
    pending = list(result.all_input_nodes)
    seen = set[Node]()
    while pending:
        node = pending.pop()
        if node not in seen and not given(node) and not isinstance(node.meta["val"], torch.SymInt):
            seen.add(node)
            pending += node.all_input_nodes
    return (node for node in program.graph.nodes if node in seen and node.op == "call_function")
