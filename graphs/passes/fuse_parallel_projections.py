"""Fuse the projections that read one input: few large products keep a memory-bound decode at the memory's speed.

Before: linear(x, w1, b1), linear(x, w2, b2), ...                                    in_proj, q, k, v; gate, up
After:  split_with_sizes(linear(x, [w1; w2; ...], [b1; b2; ...]), [n1, n2, ...], -1)
"""

import operator
from collections import defaultdict
from collections.abc import Hashable

from torch.fx import Node

from h1export.graphs.passes.base import (
    KindOf,
    Pass,
    aten,
    call,
    concatenated_weight,
    drop_unread_weights,
    linear_bias,
    replace_node,
)
from h1export.graphs.program import EditableProgram, Program, args_of


class FuseParallelProjections(Pass):
    """Fuses projections whose weights are of equal ``kind_of``; others stay apart."""

    def __init__(self, kind_of: KindOf) -> None:
        self._kind_of = kind_of

    def run(self, program: EditableProgram) -> int:
        groups = self._groups(program)
        for group in groups:
            self._fuse(program, group)
        drop_unread_weights(program)
        return len(groups)

    def _groups(self, program: Program) -> list[list[Node]]:
        groups: defaultdict[Hashable, list[Node]] = defaultdict(list)
        for node in program.calls(aten.linear.default):
            kind = self._kind_of(program.weights[args_of(node)[1].name])
            groups[node.args[0], linear_bias(node) is None, kind].append(node)
        return [group for group in groups.values() if len(group) > 1]

    def _fuse(self, program: EditableProgram, group: list[Node]) -> None:
        columns = zip(*[[arg for arg in node.args[1:] if isinstance(arg, Node)] for node in group], strict=True)
        operands = [concatenated_weight(program, column, axis=0) for column in columns]
        with program.graph.inserting_before(group[0]):
            product = call(program, aten.linear.default, group[0].args[0], *operands)
            split = call(
                program, aten.split_with_sizes.default, product, [node.meta["val"].shape[-1] for node in group], -1
            )
            replacements = [call(program, operator.getitem, split, index) for index in range(len(group))]
        for node, replacement in zip(group, replacements, strict=True):
            replace_node(program, node, replacement)

    def ensures(self, program: Program) -> None:
        self.check(not self._groups(program), "projections of one input are left apart")
