"""Time calls on a GPU in turns.

A call is timed with CUDA events around a CUDA graph of several calls on different inputs, so that neither the launches
on the CPU nor the L2 cache count; a call that a graph cannot capture is launched one by one. In a dry run on a CPU the
wall clock stands in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
CACHED = 1 << 28  # bytes of inputs, several times an L2 cache of 50 MB


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the quartiles, and how it was launched ("graph", "stream" or "wall clock")."""

    median: float
    low: float
    high: float
    launched: str

    def figures(self) -> dict[str, float | str]:
        """Return the figures of a row, in microseconds."""
        return {
            "median_us": self.median * 1e6,
            "quartile_1_us": self.low * 1e6,
            "quartile_3_us": self.high * 1e6,
            "launched": self.launched,
        }


def input_sets(size: int, device: str) -> int:
    """Return how many sets of inputs of ``size`` bytes exceed the L2 cache together; one in a dry run."""
    return 1 if device == "cpu" else min(max(-(-CACHED // size), 1), 256)


def launcher(calls: Sequence[Call], device: str) -> tuple[Call, str]:
    """Return a function that makes every call once, after warming up, and how it launches them."""

    def each() -> None:
        for call in calls:
            call()

    each()
    if device == "cpu":
        return each, "wall clock"
    each()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            each()
    except RuntimeError:  # the call synchronises, or is of a kind that a graph cannot hold
        torch.cuda.synchronize()
        return each, "stream"
    return graph.replay, "graph"


def seconds(once: Call, device: str) -> float:
    """Return the seconds of one run of ``once``."""
    if device == "cpu":
        start = time.perf_counter()
        once()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    once()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(contenders: Mapping[str, Sequence[Call]], device: str, *, rounds: int = 15) -> dict[str, Timing]:
    """Time the contenders in turns, and return the time of one call of each.

    Args:
        contenders: name to its calls, each on inputs of its own.
        device: "cuda" or "cpu".
        rounds: how often each contender makes all its calls.
    """
    ready = {name: launcher(calls, device) for name, calls in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(seconds(ready[name][0], device) / len(contenders[name]))
    return {name: summary(values, ready[name][1]) for name, values in samples.items()}


def summary(values: Sequence[float], launched: str) -> Timing:
    """Return the median and the quartiles of samples in seconds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Timing(median, low, high, launched)


def device_name(device: str) -> str:
    """Return the GPU's name as PyTorch gives it, or "cpu"."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()
