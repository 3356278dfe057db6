"""Two Triton kernels that only move memory, for the ceiling of the bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


@triton.jit
def copy_block(source, target, BLOCK: tl.constexpr):
    """Copy BLOCK elements; target may be source."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at) + 0.0)


@triton.jit
def read_block(source, sums, BLOCK: tl.constexpr):
    """Read BLOCK elements, and write their sum."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + program, tl.sum(tl.load(source + at), axis=0))


def copy(source: Tensor, target: Tensor, block: int) -> None:
    """Copy float32 ``source`` to ``target``, whose size is a multiple of ``block``."""
    copy_block[(source.numel() // block,)](source, target, BLOCK=block, num_warps=WARPS)


def read(source: Tensor, sums: Tensor, block: int) -> None:
    """Write the sum of every ``block`` elements of float32 ``source`` to ``sums``."""
    read_block[(source.numel() // block,)](source, sums, BLOCK=block, num_warps=WARPS)
