"""A piece of a split that is only split again is split at once.

Before: x1, x2 = split(x, [a + b, c], -1);  y1, y2 = split(x1, [a, b], -1)
After:  y1, y2, x2 = split(x, [a, b, c], -1)
"""

import operator

from torch.fx import Node

from h1export.graphs.passes.base import Pass, aten, call, replace_node
from h1export.graphs.program import EditableProgram, Program, args_of


class FlattenSplits(Pass):
    def run(self, program: EditableProgram) -> int:
        splits = [
            node
            for node in program.calls(aten.split_with_sizes.default)
            if any(self._inner(subgraph) for subgraph in node.users)
        ]
        for node in splits:
            self._flatten(program, node)
        return len(splits)

    def _inner(self, subgraph: Node) -> Node | None:
        """The split that is the piece's only reader, along the same (last) axis."""
        users = list(subgraph.users)
        same = len(users) == 1 and users[0].target is aten.split_with_sizes.default and users[0].args[2] == -1
        return users[0] if same else None

    def _flatten(self, program: EditableProgram, node: Node) -> None:
        x, sizes, axis = args_of(node)
        subgraphs = {args_of(subgraph)[1]: subgraph for subgraph in node.users}
        flat: list[int] = []
        places: dict[Node, int] = {}  # in the flat split
        for index, size in enumerate(sizes):
            subgraph = subgraphs.get(index)
            inner = None if subgraph is None else self._inner(subgraph)
            if inner is not None:
                places |= {part: len(flat) + args_of(part)[1] for part in inner.users}
                flat += args_of(inner)[1]
                continue
            if subgraph is not None:
                places[subgraph] = len(flat)
            flat.append(size)
        with program.graph.inserting_before(node):
            whole = call(program, aten.split_with_sizes.default, x, flat, axis)
            replacements = {
                subgraph: call(program, operator.getitem, whole, place) for subgraph, place in places.items()
            }
        for subgraph, replacement in replacements.items():
            replace_node(program, subgraph, replacement)

    def ensures(self, program: Program) -> None:
        nested = [
            node
            for node in program.calls(aten.split_with_sizes.default)
            if any(self._inner(subgraph) for subgraph in node.users)
        ]
        self.check(not nested, f"splits of splits: {nested}")
