"""Roofline estimates of the GPU kernels: the least bytes and operations of a launch, and the time that they take.

The times follow from the peaks of a GPU's data sheet; they are estimates, never measurements. The file also has the
shapes of the published models, for which kernels are compiled, estimated and tested.

Bytes count each tensor once, from or to memory; what several programs of one launch read counts once, as with a perfect
cache. Operations are those of the products on tensor cores; a product with both halves of a split operand counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from h1export.plugins.gpu.cubin import Cubin
from h1export.plugins.ssm_scan.launch import Problem

# bytes of a float32 element, and of an fp16 or bf16 element
WIDE = 4
NARROW = 2
REGISTERS = 65536  # of a multiprocessor (CUDA C++ Programming Guide, compute capabilities)
REGISTER_STEP = 8  # registers are allocated to a thread in multiples of it


class Shape(NamedTuple):
    """The sizes of a model's SSM layer, from its config.json; ``taps`` is the kernel size of the convolution."""

    model: str
    heads: int
    d_head: int
    d_state: int
    groups: int
    taps: int = 4

    @property
    def channels(self) -> int:
        """The channels of the convolution: x, B and C."""
        return self.heads * self.d_head + 2 * self.groups * self.d_state

    def problem(self, batch: int, tokens: int) -> Problem:
        """Return the scan of [batch, tokens] in fp16."""
        return Problem(
            batch,
            tokens,
            self.heads,
            groups=self.groups,
            d_head=self.d_head,
            d_state=self.d_state,
            dtype="fp16",
            dt_min=0.0,
            dt_max=1.0,
        )


PUBLISHED = (
    Shape("Tiny-R-90M", 24, 32, d_state=64, groups=1),
    Shape("0.5B", 24, 64, d_state=128, groups=1),
    Shape("1.5B", 48, 64, d_state=256, groups=1),
    Shape("1.5B-Deep", 24, 64, d_state=256, groups=1),
    Shape("3B", 32, 128, d_state=256, groups=1),
    Shape("7B", 24, 128, d_state=256, groups=1),
    Shape("34B", 32, 128, d_state=256, groups=2),
)


class Gpu(NamedTuple):
    """The peaks of a GPU, from the vendor's data sheet.

    Attributes:
        name: the name of the product.
        architecture: such as 80 for sm_80.
        bandwidth: memory bandwidth in bytes per second.
        tensor: dense fp16 products with float32 sums, in operations per second.
    """

    name: str
    architecture: int
    bandwidth: float
    tensor: float


GPUS = (
    Gpu("A100 80GB SXM", 80, 2.039e12, tensor=312e12),
    Gpu("RTX 3090", 86, 0.936e12, tensor=71e12),
    Gpu("RTX 4090", 89, 1.008e12, tensor=165e12),
    Gpu("H100 SXM", 90, 3.35e12, tensor=989e12),
    Gpu("B200", 100, 8.0e12, tensor=2250e12),
    Gpu("RTX 5090", 120, 1.792e12, tensor=210e12),
)


class Work(NamedTuple):
    """The bytes that one launch moves and the operations that it computes."""

    bytes: int
    operations: int

    def seconds(self, gpu: Gpu) -> float:
        """Return the longer of the times for moving and computing, which overlap at best."""
        return max(self.bytes / gpu.bandwidth, self.operations / gpu.tensor)

    def bound(self, gpu: Gpu) -> str:
        """Return which of the two times is longer: "memory" or "compute"."""
        return "memory" if self.bytes / gpu.bandwidth >= self.operations / gpu.tensor else "compute"


def scan_work(problem: Problem) -> Mapping[str, Work]:
    """Return the work of every kernel that the call launches, by the name of the kernel."""
    p = problem
    tiles = problem.tiles
    tokens = p.batch * p.tokens
    heads = p.batch * p.heads
    states = heads * p.d_head * p.d_state
    x = NARROW * tokens * p.heads * p.d_head
    b = NARROW * tokens * p.groups * p.d_state
    dt_and_mask = NARROW * tokens * (p.heads + 1)
    if p.tokens == 1:
        return {"decode": Work(2 * x + 2 * b + dt_and_mask + 2 * WIDE * states, 0)}  # it uses no tensor core
    entering = p.chunks * states
    pair = 2 * p.d_head * p.d_state
    keys = (tiles.chunk + tiles.chunk_scan.tokens) / 2  # of a token on average, in whole tiles
    scores = 2 * p.d_state * (p.d_head // tiles.chunk_scan.rows)  # for each key; every tile of channels computes them
    scan_operations = tokens * p.heads * (pair + keys * (scores + 2 * p.d_head))
    return {
        "chunk_state": Work(x + b + dt_and_mask + WIDE * entering, tokens * p.heads * 2 * pair),
        "state_passing": Work((WIDE + NARROW) * entering + 2 * WIDE * states, 0),
        "chunk_scan": Work(2 * x + 2 * b + dt_and_mask + NARROW * entering, round(scan_operations)),
    }


def conv_work(batch: int, tokens: int, channels: int, *, taps: int) -> Work:
    """Return the work of causal_conv, which uses no tensor core."""
    return Work(NARROW * batch * channels * (2 * tokens + 2 * (taps - 1)) + NARROW * channels * (taps + 1), 0)


def resident_warps(cubin: Cubin) -> int:
    """Return the warps that the registers of a multiprocessor have room for at the same time."""
    registers = -(-cubin.registers // REGISTER_STEP) * REGISTER_STEP
    return REGISTERS // (registers * cubin.kernel.threads) * cubin.kernel.warps
