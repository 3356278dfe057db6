"""What a pass is: requires -> run -> ensures, and edits of weight expressions that keep shared weights right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.graphs.program import Program

aten = torch.ops.aten

KindOf = Callable[
    [WeightExpr], Hashable
]  # what must be equal for two weights to share an initializer: a target's precision


class PassError(Exception):
    """A pass met a graph it does not understand: a bug in the front end, not bad input."""


class Pass(ABC):
    """One rewrite. ``run`` may change the program it is given, and returns how many places it rewrote."""

    def requires(self, program: Program) -> None:
        """Raises PassError where the program is not what ``run`` expects. By default anything will do."""
        return

    @abstractmethod
    def run(self, program: Program) -> int: ...

    @abstractmethod
    def ensures(self, program: Program) -> None:
        """Raises PassError where the promise of this pass does not hold."""

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise PassError(f"{type(self).__name__}: {what}")


def multiplier_of(program: Program, node: Node) -> tuple[Node, Multiplier] | None:
    """(x, m) where ``node`` is x * m with a constant m: a number, or a µP vector over the last axis."""
    if node.target is not aten.mul.Tensor:
        return None
    x, factor = node.args
    if not isinstance(x, Node):
        return None
    if isinstance(factor, (int, float)):
        return x, Multiplier.scalar(float(factor))
    if isinstance(factor, Node) and factor.name in program.constants:
        return x, program.constants[factor.name]
    return None


def scale_weight(program: Program, node: Any, multiplier: Multiplier) -> None:
    """Multiply the rows of the weight behind placeholder ``node``, which must have no other reader."""
    expr = program.weight_of(node)
    if expr is None or len(node.users) != 1:
        raise PassError(f"{node}: only a weight with a single reader can take a multiplier")
    program.weights[node.name] = expr.times(multiplier)  # type: ignore[index]  # the copy that run_passes made is a dict


def replace_node(program: Program, node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    program.graph.erase_node(node)


def linear_bias(node: Node) -> Node | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, Node) else None


def call(program: Program, op: Callable[..., Any], *args: Any) -> Node:
    """A new node at the graph's insertion point, with the value that torch.export would have noted for it."""
    node = program.graph.call_function(op, args)
    with torch.no_grad():
        node.meta["val"] = op(*map_arg(args, lambda argument: argument.meta["val"]))
    return node


def concatenated_weight(program: Program, placeholders: Sequence[Node], axis: Literal[0, 1]) -> Node:
    """A placeholder for the weights behind ``placeholders``, concatenated."""
    expr = WeightExpr.concatenated([program.weights[node.name] for node in placeholders], axis)
    values = [node.meta["val"] for node in placeholders]
    with program.graph.inserting_after(placeholders[0]):
        fused = program.graph.placeholder(placeholders[0].name)
    fused.meta["val"] = torch.cat(values, dim=axis)
    program.weights[fused.name] = expr  # type: ignore[index]  # the copy that run_passes made is a dict
    return fused


def drop_unread_weights(program: Program) -> None:
    """Erase the placeholders that a fusion has left without a reader."""
    for node in list(program.graph.nodes):
        if node.name in program.weights and not node.users:
            program.graph.erase_node(node)
            del program.weights[node.name]  # type: ignore[attr-defined]
