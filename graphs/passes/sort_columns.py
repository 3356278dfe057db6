"""Gather a projection's input in the order of its weight's integers, in which the columns of a group are neighbours.

Before: linear(x, w1), linear(x, w2), ...
After:  s = index_select(x, -1, order); linear(s, w1 sorted), linear(s, w2 sorted), ...     one s for equal orders
"""

from collections.abc import Callable

import torch
from torch.fx import Node

from h1export.graphs.passes.base import Pass, aten, call
from h1export.graphs.program import EditableProgram, Program, args_of


class SortColumns(Pass):
    """Gathers inputs so that products read weights whose columns are sorted by group.

    ``order_name`` gives the name of the order of a checkpoint tensor's columns, or "" where they stay as they are.
    """

    def __init__(self, order_name: Callable[[str], str]) -> None:
        self._order_name = order_name

    def run(self, program: EditableProgram) -> int:
        found: dict[tuple[Node, str], Node] = {}
        linears = self._unsorted(program)
        for linear in linears:
            x, weight = args_of(linear)[:2]
            tensor = program.weights[weight.name].only.tensor
            key = x, self._order_name(tensor)
            if key not in found:
                found[key] = self._selected(program, x, tensor, before=linear)
            program.weights[weight.name] = program.weights[weight.name].sort()
            linear.replace_input_with(x, found[key])
        return len(linears)

    def _selected(self, program: EditableProgram, x: Node, tensor: str, *, before: Node) -> Node:
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            order = program.graph.placeholder(f"order_{len(program.orders)}")
        order.meta["val"] = x.meta["val"].new_empty(x.meta["val"].shape[-1:], dtype=torch.int64)
        program.orders[order.name] = tensor
        with program.graph.inserting_before(before):
            return call(program, aten.index_select.default, x, -1, order)

    def _unsorted(self, program: Program) -> list[Node]:
        linears = [(node, program.weights[args_of(node)[1].name]) for node in program.calls(aten.linear.default)]
        return [node for node, expr in linears if not expr.parts[0].sorted and self._order_name(expr.parts[0].tensor)]

    def ensures(self, program: Program) -> None:
        self.check(not self._unsorted(program), "products are left whose columns are in another order")
