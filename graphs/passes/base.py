"""Pass: one rewrite of a Program, run as requires -> run -> ensures.

The functions are edits of graphs and weights that several passes share.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.graphs.program import EditableProgram, Program, Rewrites

aten = torch.ops.aten

# A weight -> its kind, such as its precision in a target. Only weights of equal kind share an initializer.
KindOf = Callable[[WeightExpr], Hashable]


class PassError(Exception):
    """A pass met a graph that it does not understand: a bug in the front end, not bad input."""


class Pass(ABC):
    """One rewrite of a program."""

    @property
    def name(self) -> str:
        """The name of the pass, which is that of its file: "fold_decay" for FoldDecay."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def apply(self, program: EditableProgram) -> int:
        """Rewrite ``program``, check what the pass promises, and return how many places were rewritten.

        Raises:
            PassError: a graph that the pass does not understand, or a promise that does not hold.
        """
        self.requires(program)
        count = self.run(program)
        program.graph.eliminate_dead_code()
        self.ensures(program)
        program.rewrites.append(Rewrites(self.name, count))
        return count

    def requires(self, program: Program) -> None:
        """Raise PassError where the program is not what ``run`` expects. By default nothing is expected."""
        return

    @abstractmethod
    def run(self, program: EditableProgram) -> int:
        """Rewrite ``program`` in place, and return how many places were rewritten."""

    @abstractmethod
    def ensures(self, program: Program) -> None:
        """Raise PassError where the promise of this pass does not hold."""

    def check(self, holds: bool, what: str) -> None:
        """Raise PassError with ``what`` unless the condition ``holds``."""
        if not holds:
            raise PassError(f"{type(self).__name__}: {what}")


def multiplier_of(program: Program, node: Node) -> tuple[Node, Multiplier] | None:
    """Returns (x, m) where ``node`` is x * m with a constant m, and None for any other node.

    m is a number, or a µP vector over the last axis.
    """
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


def scale_weight(program: EditableProgram, node: Any, multiplier: Multiplier) -> None:
    """Multiply the rows of the weight behind placeholder ``node``. Raises PassError where it has several readers."""
    expr = program.weight_of(node)
    if expr is None or len(node.users) != 1:
        raise PassError(f"{node}: only a weight with a single reader can take a multiplier")
    program.weights[node.name] = expr.times(multiplier)


def replace_node(program: EditableProgram, node: Node, by: Node) -> None:
    """Let the readers of ``node`` read ``by``, and erase it."""
    node.replace_all_uses_with(by)
    program.graph.erase_node(node)


def linear_bias(node: Node) -> Node | None:
    """Returns the bias of an aten.linear node, or None where it has none."""
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, Node) else None


def call(program: Program, op: Callable[..., Any], *args: Any) -> Node:
    """Returns a new node at the graph's insertion point, with the meta value that torch.export would have given it."""
    node = program.graph.call_function(op, args)
    with torch.no_grad():
        node.meta["val"] = op(*map_arg(args, lambda argument: argument.meta["val"]))
    return node


def concatenated_weight(program: EditableProgram, placeholders: Sequence[Node], axis: Literal[0, 1]) -> Node:
    """Returns a new placeholder for the weights behind ``placeholders``, concatenated."""
    expr = WeightExpr.concatenated([program.weights[node.name] for node in placeholders], axis)
    values = [node.meta["val"] for node in placeholders]
    with program.graph.inserting_after(placeholders[0]):
        fused = program.graph.placeholder(placeholders[0].name)
    fused.meta["val"] = torch.cat(values, dim=axis)
    program.weights[fused.name] = expr
    return fused


def drop_unread_weights(program: EditableProgram) -> None:
    """Erase the placeholders that a fusion has left without a reader."""
    for node in list(program.graph.nodes):
        if node.name in program.weights and not node.users:
            program.graph.erase_node(node)
            del program.weights[node.name]
