"""Take the last positions of both summands instead of those of their sum, so that a norm still reads a sum.

Runtimes compute a sum and the norm that reads it in one kernel, and some the product behind them too.

Before: rms_norm(narrow(add(a, b), 1, start, n), w)
After:  rms_norm(add(narrow(a, 1, start, n), narrow(b, 1, start, n)), w)
"""

from torch.fx import Node

from h1export.graphs.passes.base import Pass, aten, call, replace_node
from h1export.graphs.program import EditableProgram, Program, args_of


class NarrowSummands(Pass):
    """Moves a narrow of positions in front of the sum that nothing else reads."""

    def run(self, program: EditableProgram) -> int:
        narrows = [node for node in program.calls(aten.narrow.default) if self._sum(node)]
        for node in narrows:
            total, *place = args_of(node)
            with program.graph.inserting_before(node):
                parts = [call(program, aten.narrow.default, x, *place) for x in args_of(total)]
                replacement = call(program, aten.add.Tensor, *parts)
            replace_node(program, node, replacement)
        return len(narrows)

    def _sum(self, node: Node) -> bool:
        """Whether ``node`` is the only reader of a sum of two tensors of one shape."""
        total = args_of(node)[0]
        if total.target is not aten.add.Tensor or len(total.users) != 1 or total.kwargs:
            return False
        shapes = [x.meta["val"].shape if isinstance(x, Node) else None for x in args_of(total)]
        return len(shapes) == 2 and shapes[0] == shapes[1]

    def ensures(self, program: Program) -> None:
        left = [node for node in program.calls(aten.narrow.default) if self._sum(node)]
        self.check(not left, f"narrowed sums: {left}")
