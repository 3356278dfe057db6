"""The shapes of the published Falcon-H1 models that the kernels depend on, from their configs."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Of a layer's SSM."""

    model: str
    heads: int
    d_head: int
    d_state: int
    groups: int
    taps: int = 4

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.heads * self.d_head + 2 * self.groups * self.d_state


PUBLISHED = (
    Shape("Tiny-R-90M", 24, 32, 64, 1),
    Shape("0.5B", 24, 64, 128, 1),
    Shape("1.5B", 48, 64, 256, 1),
    Shape("1.5B-Deep", 24, 64, 256, 1),
    Shape("3B", 32, 128, 256, 1),
    Shape("7B", 24, 128, 256, 1),
    Shape("34B", 32, 128, 256, 2),
)
