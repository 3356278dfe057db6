"""The sizes of the h1 ops as the traced graph has them.

Emitters read sizes from the node that they emit, never from the config: a pass or another model may give a node other
sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from h1export.graphs.program import args_of


def size_of(node: Any, axis: int) -> int:
    """Return the size of one axis of a node's value, which must be a number and not a symbol such as the batch."""
    size = node.meta["val"].shape[axis]
    assert isinstance(size, int), f"axis {axis} of {node} is {size}, which a call decides"
    return size


@dataclass(frozen=True)
class AttentionSizes:
    """The sizes of an h1.attention: query heads, key and value heads, and columns of a head."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, node: Node) -> AttentionSizes:
        q, k = args_of(node)[:2]
        return cls(size_of(q, 2), size_of(k, 2), size_of(q, 3))

    @property
    def group(self) -> int:
        """How many query heads read one head of keys and values."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """The factor of scores: 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class ScanSizes:
    """The sizes of an h1.ssm_scan: heads, groups that share B and C, channels of a head, and columns of its state."""

    heads: int
    groups: int
    d_head: int
    d_state: int

    @classmethod
    def of(cls, node: Node) -> ScanSizes:
        x, _, _, B = args_of(node)[:4]
        return cls(size_of(x, 2), size_of(B, 2), size_of(x, 3), d_state=size_of(B, 3))

    @property
    def group(self) -> int:
        """How many heads read one group of B and C."""
        return self.heads // self.groups
