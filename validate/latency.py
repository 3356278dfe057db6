"""Latency as a ratio: artifact and reference take turns in one process, and the median of the pairs' ratios counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from h1export.core.protocols import Ids, Runner
from h1export.validate.reference import Reference

PREFILL, DECODE = 128, 16  # tokens a prefill, steps a decode run


@dataclass(frozen=True)
class Latency:
    """Medians over pairs: seconds of the artifact, of the reference, and of their ratio (below 1: the artifact is faster)."""

    artifact: float
    reference: float
    ratio: float


def paired(artifact: Callable[[], None], reference: Callable[[], None], pairs: int) -> Latency:
    """Run both by turns, ``pairs`` times after one warm-up each, the order swapped every time."""
    artifact()
    reference()
    ours: list[float] = []
    theirs: list[float] = []
    for pair in range(pairs):
        for run, times in [(artifact, ours), (reference, theirs)][:: 1 if pair % 2 else -1]:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return Latency(median(ours), median(theirs), median(a / b for a, b in zip(ours, theirs, strict=True)))


def measure(runner: Runner[Any], reference: Reference, prompt: Ids, pairs: int) -> dict[str, Latency]:
    """Prefill of ``prompt`` [seq] and DECODE steps after it."""
    batch, token = prompt[None], prompt[-1:][None]
    ones = np.ones((1, len(prompt) + DECODE), np.int64)
    _, states = runner.step(batch, ones[:, : len(prompt)], runner.initial(1))
    sequences = reference.start(1, 0)
    sequences.append(batch)

    def prefill() -> None:
        runner.step(batch, ones[:, : len(prompt)], runner.initial(1))

    def reference_prefill() -> None:
        reference.start(1, 0).append(batch)

    def decode() -> None:
        current = states
        for step in range(DECODE):
            _, current = runner.step(token, ones[:, : len(prompt) + step + 1], current)

    def reference_decode() -> None:
        for _ in range(DECODE):  # the cache grows on; a few dozen columns do not change the time of a step
            sequences.append(token)

    return {"prefill": paired(prefill, reference_prefill, pairs), "decode": paired(decode, reference_decode, pairs)}
