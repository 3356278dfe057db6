"""Fuse two projections whose results are added: out_proj and o_proj of the mixers.

Before: add(add(h, linear(y, w1)), linear(a, w2))
After:  add(h, linear(cat([y, a], -1), [w1 | w2]))
"""

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


class FuseSummedProjections(Pass):
    """Fuses projections whose weights are of equal ``kind_of`` and have a multiple of ``align`` columns.

    Projections with biases, or with a factor for each row, stay apart.
    """

    def __init__(self, kind_of: KindOf, align: int) -> None:
        self._kind_of = kind_of
        self._align = align

    def run(self, program: EditableProgram) -> int:
        sums = self._sums(program)
        for outer, inner in sums:
            (residual, first) = args_of(inner)
            second = args_of(outer)[1]
            (x1, w1, *_) = args_of(first)
            (x2, w2, *_) = args_of(second)
            weight = concatenated_weight(program, [w1, w2], axis=1)
            with program.graph.inserting_before(outer):
                product = call(program, aten.linear.default, call(program, aten.cat.default, [x1, x2], -1), weight)
                added = call(program, aten.add.Tensor, residual, product)
            replace_node(program, outer, added)
            for node in (inner, first, second):
                program.graph.erase_node(node)
        drop_unread_weights(program)
        return len(sums)

    def _sums(self, program: Program) -> list[tuple[Node, Node]]:
        """Returns (outer, inner) where outer = inner + linear and inner = h + linear, of equal kind."""
        return [
            (outer, inner)
            for outer in program.calls(aten.add.Tensor)
            if isinstance(inner := outer.args[0], Node)
            and inner.target is aten.add.Tensor
            and len(inner.users) == 1
            and self._fusable(program, args_of(inner)[1])
            and self._fusable(program, args_of(outer)[1])
            and self._kind(program, args_of(inner)[1]) == self._kind(program, args_of(outer)[1])
        ]

    def _fusable(self, program: Program, node: object) -> bool:
        return (
            isinstance(node, Node)
            and node.target is aten.linear.default
            and len(node.users) == 1
            and linear_bias(node) is None
            and len(parts := program.weights[args_of(node)[1].name].parts) == 1
            and parts[0].multiplier.is_scalar
            and args_of(node)[1].meta["val"].shape[1] % self._align == 0
        )

    def _kind(self, program: Program, linear: Node) -> object:
        return self._kind_of(program.weights[args_of(linear)[1].name])

    def ensures(self, program: Program) -> None:
        self.check(not self._sums(program), "summed projections are left apart")
