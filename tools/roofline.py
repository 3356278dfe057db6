"""Estimate what a launch must move and compute at least, and the time that takes on a GPU of known peaks.

Bytes: each tensor once, from or to memory; what several programs of one launch read counts once, as with a perfect
cache. Operations: those of the products on tensor cores; a product with both halves of a split operand counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from h1export.plugins.ssm_scan.launch import Problem

# bytes of float32, and of fp16 or bf16
WIDE = 4
NARROW = 2


class Gpu(NamedTuple):
    """Peaks from the vendor's data sheets.

    Memory is in bytes a second, dense products of fp16 with float32 sums in operations a second.
    """

    name: str
    architecture: int
    bandwidth: float
    tensor: float


GPUS = (
    Gpu("A100 80GB SXM", 80, 2.039e12, 312e12),
    Gpu("RTX 3090", 86, 0.936e12, 71e12),
    Gpu("RTX 4090", 89, 1.008e12, 165e12),
    Gpu("H100 SXM", 90, 3.35e12, 989e12),
    Gpu("B200", 100, 8.0e12, 2250e12),
    Gpu("RTX 5090", 120, 1.792e12, 210e12),
)


class Work(NamedTuple):
    """Of one launch."""

    bytes: int
    operations: int

    def seconds(self, gpu: Gpu) -> float:
        """The longer of moving and computing, which overlap at best."""
        return max(self.bytes / gpu.bandwidth, self.operations / gpu.tensor)

    def bound(self, gpu: Gpu) -> str:
        """Which of the two that is."""
        return "memory" if self.bytes / gpu.bandwidth >= self.operations / gpu.tensor else "compute"


def scan_work(problem: Problem) -> Mapping[str, Work]:
    """Kernel -> what it takes, for every kernel that the call launches."""
    p = problem
    tiles = problem.tiles
    tokens = p.batch * p.tokens
    heads = p.batch * p.heads
    states = heads * p.d_head * p.d_state
    x, b, dt = (
        NARROW * tokens * count for count in (p.heads * p.d_head, p.groups * p.d_state, p.heads + 1)
    )  # dt: and mask
    if p.tokens == 1:
        return {"decode": Work(2 * x + 2 * b + dt + 2 * WIDE * states, 0)}  # its products are on no tensor core
    entering = p.chunks * states
    pair = 2 * p.d_head * p.d_state
    keys = (tiles.chunk + tiles.chunk_scan.tokens) / 2  # of a token on average, in whole tiles
    scores = 2 * p.d_state * (p.d_head // tiles.chunk_scan.rows)  # for each key; every tile of channels computes them
    return {
        "chunk_state": Work(x + b + dt + WIDE * entering, tokens * p.heads * 2 * pair),
        "state_passing": Work((WIDE + NARROW) * entering + 2 * WIDE * states, 0),
        "chunk_scan": Work(
            2 * x + 2 * b + dt + NARROW * entering, round(tokens * p.heads * (pair + keys * (scores + 2 * p.d_head)))
        ),
    }


def conv_work(batch: int, tokens: int, channels: int, taps: int) -> Work:
    """Of causal_conv; its products are on no tensor core."""
    return Work(NARROW * batch * channels * (2 * tokens + 2 * (taps - 1)) + NARROW * channels * (taps + 1), 0)
