"""PrefixStore: states of the beginnings of sequences that were computed, from which other sequences go on.

Each edge of a radix tree has tokens with their keys and values, which sequences with the same beginning share. Some
nodes are points: they have the states of the convolutions and scans too, without which a sequence cannot go on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.runtime.saved_states import SavedStates


@dataclass(eq=False)
class _Node:
    """A node and the edge to it.

    Attributes:
        key: int64 [tokens], the edge's part of the sequence's key.
        end: The number of tokens from the root to here.
        growing: Keys and values of the edge's tokens by ``StateTensor.key``, [1, heads, tokens, head_dim].
        fixed: The other states after the last token; None where this is no point.
        parent: The node before; None for the root.
        children: The nodes after it by the first number of their edges.
    """

    key: Ids
    end: int
    growing: dict[str, Array]
    fixed: dict[str, Array] | None
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def edge_bytes(self) -> int:
        return self.key.nbytes + _bytes(self.growing)


class PrefixStore:
    """Saved states by the sequences that they are of; threads may share it.

    A key is a sequence of numbers, one a token. Equal keys have to mean equal states, so a caller who divides the same
    tokens into other calls gives other numbers. Points that were not used for the longest time go first where a new
    one needs their room.

    Args:
        spec: The states of the model.
        budget: The most bytes of states and keys.

    Attributes:
        nbytes: The bytes in use.
        hits: How often a point was found.
        reused: The tokens that did not have to be computed.
    """

    def __init__(self, spec: StateSpec, budget: int) -> None:
        self._spec = spec
        self._budget = budget
        self._lock = Lock()
        self._root = _Node(np.zeros(0, np.int64), 0, {}, None, None)
        self._points: OrderedDict[_Node, None] = OrderedDict()  # the one used last is last
        self._fixed_bytes = sum(4 * _size(tensor.sized(1, 0)) for tensor in spec.tensors if not tensor.kind.grows)
        self._token_bytes = 8 + sum(4 * _size(tensor.sized(1, 1)) for tensor in spec.tensors if tensor.kind.grows)
        self.nbytes = 0
        self.hits = 0
        self.reused = 0

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self._points)

    def find(self, key: Sequence[int]) -> SavedStates | None:
        """Return the states of the longest beginning of ``key`` that is a point and leaves a token to compute."""
        whole = np.asarray(key, np.int64)
        with self._lock:
            path, _ = self._walk(whole)
            while path and (path[-1].fixed is None or path[-1].end >= len(whole)):
                path.pop()
            if not path:
                return None
            self._points.move_to_end(path[-1])
            self.hits += 1
            self.reused += path[-1].end
            parts = [
                SavedStates(node.end - len(node.key), node.end, {**node.growing, **(node.fixed or {})}) for node in path
            ]
        return SavedStates.joined(self._spec, parts)  # nothing changes the arrays

    def shared(self, key: Sequence[int]) -> int:
        """Return how many numbers ``key`` begins with like another key."""
        with self._lock:
            return self._walk(np.asarray(key, np.int64))[1]

    def add(self, key: Sequence[int], states: Callable[[int], SavedStates]) -> bool:
        """Keep the states after ``key``, and return whether they are here now.

        Args:
            key: The whole sequence's key.
            states: Returns the states, with keys and values of the tokens from its argument on. It is not called where
                they are here already, or cannot be kept.
        """
        whole = np.asarray(key, np.int64)
        if not len(whole) or self._fixed_bytes + len(whole) * self._token_bytes > self._budget:
            return False
        with self._lock:
            path, known = self._walk(whole)
            if known == len(whole) and path and path[-1].end == known and path[-1].fixed is not None:
                self._points.move_to_end(path[-1])
                return True
            while self.nbytes + self._fixed_bytes + (len(whole) - known) * self._token_bytes > self._budget:
                self._drop(next(iter(self._points)))
                path, known = self._walk(whole)
            self._insert(whole, known, states(min(known, len(whole) - 1)))
        return True

    def clear(self) -> None:
        """Forget all points."""
        with self._lock:
            while self._points:
                self._drop(next(iter(self._points)))

    def _walk(self, key: Ids) -> tuple[list[_Node], int]:
        """Return the nodes whose whole edges ``key`` has, without the root, and how long it is like a path."""
        path: list[_Node] = []
        node, known = self._root, 0
        while known < len(key) and (child := node.children.get(int(key[known]))) is not None:
            same = _alike(child.key, key[known:])
            known += same
            if same < len(child.key):
                break
            path.append(child)
            node = child
        return path, known

    def _insert(self, key: Ids, known: int, saved: SavedStates) -> None:
        path, _ = self._walk(key)
        node = path[-1] if path else self._root
        if node.end < known:
            node = self._split(node.children[int(key[node.end])], known - node.end)
        if known < len(key):
            columns = slice(known - saved.start, None)
            growing = {
                tensor.key: np.array(saved.arrays[tensor.key][:, :, columns], order="C")
                for tensor in self._spec.tensors
                if tensor.kind.grows
            }
            child = _Node(key[known:].copy(), len(key), growing, None, node)
            node.children[int(key[known])] = child
            self.nbytes += child.edge_bytes
            node = child
        node.fixed = {tensor.key: saved.arrays[tensor.key] for tensor in self._spec.tensors if not tensor.kind.grows}
        self.nbytes += _bytes(node.fixed)
        self._points[node] = None

    def _split(self, node: _Node, at: int) -> _Node:
        """Put a node into the edge to ``node`` after ``at`` tokens, and return it. Arrays are copied, to be freed."""
        parent = node.parent
        assert parent is not None
        first = {name: array[:, :, :at].copy() for name, array in node.growing.items()}
        middle = _Node(node.key[:at].copy(), parent.end + at, first, None, parent)
        parent.children[int(middle.key[0])] = middle
        node.growing = {name: array[:, :, at:].copy() for name, array in node.growing.items()}
        node.key = node.key[at:].copy()
        node.parent = middle
        middle.children[int(node.key[0])] = node
        return middle

    def _drop(self, node: _Node) -> None:
        """Let ``node`` be no point, and remove the edges that lead to none then."""
        del self._points[node]
        assert node.fixed is not None
        self.nbytes -= _bytes(node.fixed)
        node.fixed = None
        while node.parent is not None and node.fixed is None and not node.children:
            self.nbytes -= node.edge_bytes
            del node.parent.children[int(node.key[0])]
            node = node.parent


def _alike(one: Ids, other: Ids) -> int:
    """Return how many numbers both begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _bytes(arrays: dict[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _size(shape: Sequence[Any]) -> int:
    return int(np.prod(shape))
