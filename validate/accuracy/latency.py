"""Latency as a ratio: artifact and reference take turns in one process, and the median of the pairs' ratios counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Ids
from h1export.runtime.runner import Runner, Session
from h1export.validate.accuracy.reference import Reference

# tokens a prefill, steps a decode run
PREFILL = 128
DECODE = 16


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


def tokens_needed(pairs: int) -> int:
    """How long the sequences of ``measure`` get."""
    return PREFILL + DECODE * (pairs + 1)


def measure(runner: Runner[Any], reference: Reference, prompt: Ids, pairs: int) -> dict[str, Latency]:
    """A prefill of ``prompt`` [PREFILL], and DECODE steps after it; the sequences grow on, which changes little in a step's time."""
    batch = prompt[None]
    token = prompt[-1:][None]
    ones = np.ones((1, len(prompt)), np.int64)

    def prefill() -> None:
        runner.step(batch, ones, runner.initial(1))

    def reference_prefill() -> None:
        reference.start(1, 0).append(batch)

    def decode(sequences: Session) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(DECODE):
                sequences.append(token)

        sequences.append(batch)
        return steps

    ours = decode(runner.start(1, tokens_needed(pairs)))
    theirs = decode(reference.start(1, 0))
    return {"prefill": paired(prefill, reference_prefill, pairs), "decode": paired(ours, theirs, pairs)}
