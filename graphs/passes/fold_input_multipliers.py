"""Fold µP multipliers before projections into their weights; biases are added after and do not take part.

Before: x2 = mul(x, m); linear(x2, w1, b1), linear(x2, w2, b2), ...
After:  linear(x, m * w1, b1), linear(x, m * w2, b2), ...
"""

from torch.fx import Node

from h1export.graphs.passes.base import Pass, aten, multiplier_of, replace_node, scale_weight
from h1export.graphs.program import EditableProgram, Program


class FoldInputMultipliers(Pass):
    """Folds the multiplier of an input into the weights of all projections that read it."""

    def run(self, program: EditableProgram) -> int:
        count = 0
        for node in program.calls(aten.mul.Tensor):
            match = multiplier_of(program, node)
            if match is None or not self._feeds_projections_only(node):
                continue
            x, multiplier = match
            self.check(multiplier.is_scalar, f"{node} scales a projection's input by a vector")
            for linear in node.users:
                scale_weight(program, linear.args[1], multiplier)
            replace_node(program, node, x)
            count += 1
        return count

    def _feeds_projections_only(self, node: Node) -> bool:
        return bool(node.users) and all(
            user.target is aten.linear.default and user.args[0] is node for user in node.users
        )

    def ensures(self, program: Program) -> None:
        left = [
            node
            for node in program.calls(aten.mul.Tensor)
            if multiplier_of(program, node) and self._feeds_projections_only(node)
        ]
        self.check(not left, f"multipliers left before projections: {left}")
