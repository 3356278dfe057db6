"""Flatten nested splits: a part of a split that is only split again.

Before: x1, x2 = split(x, [a + b, c], -1);  y1, y2 = split(x1, [a, b], -1)
After:  y1, y2, x2 = split(x, [a, b, c], -1)
"""

import operator

from torch.fx import Node

from h1export.graphs.passes.base import Pass, aten, call, replace_node
from h1export.graphs.program import EditableProgram, Program, args_of


class FlattenSplits(Pass):
    """Merges a split with the splits of its parts."""

    def run(self, program: EditableProgram) -> int:
        splits = [
            node
            for node in program.calls(aten.split_with_sizes.default)
            if any(self._inner(part) for part in node.users)
        ]
        for node in splits:
            self._flatten(program, node)
        return len(splits)

    def _inner(self, part: Node) -> Node | None:
        """Returns the split that is the only reader of ``part``, along the same (last) axis; None: there is none."""
        users = list(part.users)
        same = len(users) == 1 and users[0].target is aten.split_with_sizes.default and users[0].args[2] == -1
        return users[0] if same else None

    def _flatten(self, program: EditableProgram, node: Node) -> None:
        x, sizes, axis = args_of(node)
        parts = {args_of(part)[1]: part for part in node.users}
        flat: list[int] = []
        places: dict[Node, int] = {}  # in the flat split
        for index, size in enumerate(sizes):
            part = parts.get(index)
            inner = None if part is None else self._inner(part)
            if inner is not None:
                places |= {user: len(flat) + args_of(user)[1] for user in inner.users}
                flat += args_of(inner)[1]
                continue
            if part is not None:
                places[part] = len(flat)
            flat.append(size)
        with program.graph.inserting_before(node):
            whole = call(program, aten.split_with_sizes.default, x, flat, axis)
            replacements = {part: call(program, operator.getitem, whole, place) for part, place in places.items()}
        for part, replacement in replacements.items():
            replace_node(program, part, replacement)

    def ensures(self, program: Program) -> None:
        nested = [
            node
            for node in program.calls(aten.split_with_sizes.default)
            if any(self._inner(part) for part in node.users)
        ]
        self.check(not nested, f"splits of splits: {nested}")
