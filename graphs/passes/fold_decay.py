"""Compute the scan's decay rates from the checkpoint instead of in the graph.

Before: h1::ssm_scan(..., A=neg(exp(A_log)), ...)
After:  h1::ssm_scan(..., A=weight, ...) with weight = -exp(A_log)
"""

from torch.fx import Node

from h1export.graphs.passes.base import Pass, PassError, aten, replace_node
from h1export.graphs.program import EditableProgram, Program


class FoldDecay(Pass):
    """Folds exp and neg into the weight A_log."""

    def run(self, program: EditableProgram) -> int:
        count = 0
        # calls are in graph order, so exp is folded already when its neg is reached
        for node in program.calls(aten.exp.default, aten.neg.default):
            if program.weight_of(node.args[0]):
                self._fold(program, node)
                count += 1
        return count

    def _fold(self, program: EditableProgram, node: Node) -> None:
        weight = node.args[0]
        expr = program.weight_of(weight)
        if not isinstance(weight, Node) or expr is None or len(weight.users) != 1:
            raise PassError(f"FoldDecay: {weight} has other readers")
        program.weights[weight.name] = expr.apply("exp" if node.target is aten.exp.default else "neg")
        replace_node(program, node, weight)

    def ensures(self, program: Program) -> None:
        self.check(not list(program.calls(aten.exp.default, aten.neg.default)), "an exp or neg is left in the graph")
