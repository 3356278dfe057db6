"""Latency as the median of ratios: artifact and reference take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from h1export.model.falcon_h1.states import Ids
from h1export.report.checks import Phase
from h1export.runtime.runner import Runner, Session
from h1export.validate.accuracy.reference import Reference
from h1export.validate.speed.decision import median_interval

PREFILL_TOKENS = 128  # of one timed prefill
DECODE_STEPS = 16  # of one timed run of decode


ERROR = 0.05  # probability that the interval of the ratio misses it


@dataclass(frozen=True)
class Latency:
    """Medians over pairs: seconds of artifact and reference, and their ratio (below 1: the artifact is faster).

    ``low`` is the lower end of the ratio's interval, which misses the true median with at most probability ERROR; it is
    0 where there are too few pairs for one.
    """

    artifact: float
    reference: float
    ratio: float
    low: float

    def exceeds(self, limit: float) -> bool | None:
        """Return whether the ratio is above ``limit``; None where the timings scatter too much to say that it is."""
        if self.ratio <= limit:
            return False
        return True if self.low > limit else None


def paired(artifact: Callable[[], None], reference: Callable[[], None], pairs: int) -> Latency:
    """Time both in turns, ``pairs`` times after one warm-up each; every second pair runs in reverse order."""
    artifact()
    reference()
    ours: list[float] = []
    theirs: list[float] = []
    for pair in range(pairs):
        for run, times in [(artifact, ours), (reference, theirs)][:: 1 if pair % 2 else -1]:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return of_times(ours, theirs)


def of_times(ours: Sequence[float], theirs: Sequence[float]) -> Latency:
    """Return the latency of pairs of timings in seconds, in the order in which they were measured."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    try:
        low = median_interval(ratios, ERROR).low
    except ValueError:  # too few pairs
        low = 0.0
    return Latency(median(ours), median(theirs), median(ratios), low=low)


def tokens_needed(pairs: int) -> int:
    """Return the number of tokens that the sequences of ``measure`` have at its end."""
    return PREFILL_TOKENS + DECODE_STEPS * (pairs + 1)


def measure(runner: Runner[Any], reference: Reference, prompt: Ids, *, pairs: int) -> dict[Phase, Latency]:
    """Time a prefill of ``prompt`` [PREFILL_TOKENS], and DECODE_STEPS steps after it.

    The sequences go on growing from pair to pair, which changes the time of a step little.
    """
    batch = prompt[None]
    token = prompt[-1:][None]
    ones = np.ones((1, len(prompt)), np.int64)

    def prefill() -> None:
        runner.step(batch, ones, runner.initial(1))

    def reference_prefill() -> None:
        reference.start(1, 0).append(batch)

    def decode(session: Session) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(DECODE_STEPS):
                session.append(token)

        session.append(batch)
        return steps

    ours = decode(runner.start(1, tokens_needed(pairs)))
    theirs = decode(reference.start(1, 0))
    return {Phase.PREFILL: paired(prefill, reference_prefill, pairs), Phase.DECODE: paired(ours, theirs, pairs)}
