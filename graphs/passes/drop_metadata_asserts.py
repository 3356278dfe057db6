"""Drop torch.export's dtype assertions.

Before: aten._assert_tensor_metadata(x, dtype=int64); y = aten.to(x, float32)
After:  y = aten.to(x, float32)
"""

from h1export.graphs.passes.base import Pass, aten
from h1export.graphs.program import EditableProgram, Program

_ASSERT = aten._assert_tensor_metadata.default


class DropMetadataAsserts(Pass):
    """Erases the assertions on dtypes."""

    def run(self, program: EditableProgram) -> int:
        found = list(program.calls(_ASSERT))
        for node in found:
            program.graph.erase_node(node)
        return len(found)

    def ensures(self, program: Program) -> None:
        self.check(not list(program.calls(_ASSERT)), "an assertion is left")
