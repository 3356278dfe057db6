"""Fold µP multipliers after a projection into its rows and bias.

Before: mul(linear(x, w, b), m)          m a number or the mup vector
After:  linear(x, m * w, m * b)
"""

from h1export.graphs.passes.base import Pass, aten, linear_bias, multiplier_of, replace_node, scale_weight
from h1export.graphs.program import EditableProgram, Program


class FoldOutputMultipliers(Pass):
    """Folds the multiplier of an output into the projection's weight and bias."""

    def run(self, program: EditableProgram) -> int:
        count = 0
        for node in program.calls(aten.mul.Tensor):
            match = multiplier_of(program, node)
            if match is None or match[0].target is not aten.linear.default:
                continue
            linear, multiplier = match
            self.check(len(linear.users) == 1, f"{linear} has readers besides its multiplier")
            scale_weight(program, linear.args[1], multiplier)
            if (bias := linear_bias(linear)) is not None:
                scale_weight(program, bias, multiplier)
            replace_node(program, node, linear)
            count += 1
        for name in [name for name in program.constants if not self._used(program, name)]:
            (placeholder,) = [node for node in program.graph.nodes if node.name == name]
            program.graph.erase_node(placeholder)
            del program.constants[name]
        return count

    def _used(self, program: Program, name: str) -> bool:
        return any(node.users for node in program.graph.nodes if node.name == name)

    def ensures(self, program: Program) -> None:
        matches = [multiplier_of(program, node) for node in program.calls(aten.mul.Tensor)]
        left = [match[0] for match in matches if match and match[0].target is aten.linear.default]
        self.check(not left, f"multipliers left after projections: {left}")
        self.check(not program.constants, f"µP vectors left: {list(program.constants)}")
