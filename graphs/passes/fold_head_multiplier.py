"""Fold lm_head_multiplier into the final norm, so that a tied head stays the embedding, bit for bit.

Before: mul(linear(rms_norm(h, w), head), m)
After:  linear(rms_norm(h, m * w), head)
"""

from torch.fx import Node

from h1export.graphs.passes.base import Pass, aten, multiplier_of, replace_node, scale_weight
from h1export.graphs.program import EditableProgram, Program


class FoldHeadMultiplier(Pass):
    """Folds the multiplier of the logits into the final norm's weight."""

    def run(self, program: EditableProgram) -> int:
        logits = self._logits(program)
        match = multiplier_of(program, logits)
        if match is None:
            return 0
        linear, multiplier = match
        self.check(linear.target is aten.linear.default, f"expected the head below {logits}, found {linear}")
        norm = linear.args[0]
        self.check(
            isinstance(norm, Node) and norm.target is aten.rms_norm.default and len(norm.users) == 1,
            "no final norm of its own",
        )
        assert isinstance(norm, Node)
        scale_weight(program, norm.args[2], multiplier)
        replace_node(program, logits, linear)
        return 1

    def _logits(self, program: Program) -> Node:
        (result,) = [node for node in program.graph.nodes if node.op == "output"]
        logits = result.args[0][0]
        assert isinstance(logits, Node)
        return logits

    def ensures(self, program: Program) -> None:
        self.check(self._logits(program).target is aten.linear.default, "the logits are not the head's own output")
