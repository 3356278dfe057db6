"""Measure the two ceilings of the roofline on this device: memory bandwidth and matrix products.

The bandwidth is that of the fastest of several streams over buffers much larger than the L2 cache, by the bytes read
plus those written. One copy is no ceiling: the device copy behind copy_ reached 2.43 TB/s on an H100 where h1export's
decode kernel moved 2.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from benchmarks.gpu import clock
from benchmarks.gpu.clock import Call
from roofline import Gpu
from torch import Tensor

BUFFERS = (1 << 28, 1 << 30, 1 << 32)  # bytes of a buffer; an H100's L2 cache has 50 MB
PRODUCTS = (4096, 8192)  # rows and columns of the matrices
BLOCKS = (1024, 4096)  # elements that a program of a Triton stream covers
DRY_BUFFERS, DRY_PRODUCTS, DRY_BLOCKS = (1 << 14,), (64,), (1024,)


class Stream(NamedTuple):
    """A call that moves memory, and the bytes that it reads plus those that it writes."""

    call: Call
    bytes: int


class Ceilings(NamedTuple):
    """What was measured: the peaks, the stream that was fastest, and bytes per second by stream."""

    gpu: Gpu
    fastest: str
    streams: Mapping[str, float]

    def figures(self) -> dict[str, float | str]:
        """Return the figures of a row."""
        return {
            "bandwidth_bytes_per_s": self.gpu.bandwidth,
            "bandwidth_of": self.fastest,
            "copy_bytes_per_s": max(rate for name, rate in self.streams.items() if name.startswith("torch copy ")),
            "bf16_operations_per_s": self.gpu.tensor,
        }


def streams(source: Tensor, target: Tensor, blocks: tuple[int, ...]) -> dict[str, Stream]:
    """Return the ways to stream over two float32 buffers of the same size, by name; none changes the values."""
    from benchmarks.gpu import streaming

    size = source.numel() * source.element_size()
    found = {
        "torch copy": Stream(lambda: target.copy_(source), 2 * size),
        "torch scaled copy": Stream(lambda: torch.mul(source, 1.0, out=target), 2 * size),
        "torch update in place": Stream(lambda: target.mul_(1.0), 2 * size),
    }
    for block in blocks:

        def copy(to: Tensor, block: int = block) -> Call:
            return lambda: streaming.copy(source, to, block)

        found[f"Triton copy by {block}"] = Stream(copy(target), 2 * size)
        found[f"Triton update in place by {block}"] = Stream(copy(source), 2 * size)
        found[f"Triton read by {block}"] = Stream(reading(source, block), size)
    return found


def reading(source: Tensor, block: int) -> Call:
    """Return a call that reads a buffer and writes one sum a program, whose bytes do not count."""
    from benchmarks.gpu import streaming

    sums = torch.empty(source.numel() // block, device=source.device)
    return lambda: streaming.read(source, sums, block)


def measure(device: str) -> Ceilings:
    """Return the ceilings of this device; the best median of all streams, and that of all products."""
    dry = device == "cpu"
    rates: dict[str, float] = {}
    for size in DRY_BUFFERS if dry else BUFFERS:
        source = torch.zeros(size // 4, device=device)
        ways = streams(source, torch.empty_like(source), DRY_BLOCKS if dry else BLOCKS)
        times = clock.interleaved({name: [way.call] for name, way in ways.items()}, device, rounds=3 if dry else 15)
        rates |= {f"{name} of {size >> 20} MiB": way.bytes / times[name].median for name, way in ways.items()}
        del source, ways
    fastest = max(rates, key=rates.__getitem__)
    major, minor = (0, 0) if dry else torch.cuda.get_device_capability()
    gpu = Gpu(clock.device_name(device), 10 * major + minor, rates[fastest], tensor=products(device))
    return Ceilings(gpu, fastest, rates)


def products(device: str) -> float:
    """Return the operations per second of the fastest bf16 product."""
    dry = device == "cpu"
    calls: dict[str, list[Any]] = {}
    sizes = DRY_PRODUCTS if dry else PRODUCTS
    for size in sizes:
        a, b, out = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
        calls[str(size)] = [lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]
    times = clock.interleaved(calls, device, rounds=3 if dry else 15)
    return max(2 * size**3 / times[str(size)].median for size in sizes)
