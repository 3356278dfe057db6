"""Latency as a ratio: artifact and reference take turns in one process, and the median of the pairs' ratios counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from h1export.core.protocols import Ids, Runner, Sequences
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


def tokens_needed(pairs: int) -> int:
    """How long the sequences of ``measure`` get."""
    return PREFILL + DECODE * (pairs + 1)


def measure(runner: Runner[Any], reference: Reference, prompt: Ids, pairs: int) -> dict[str, Latency]:
    """A prefill of ``prompt`` [PREFILL], and DECODE steps after it; the sequences grow on, which changes little in a step's time."""
    batch, token = prompt[None], prompt[-1:][None]
    ours, theirs = partial(runner.start, 1, tokens_needed(pairs)), partial(reference.start, 1, 0)

    def prefill(start: Callable[[], Sequences]) -> Callable[[], None]:
        return lambda: _extend(start(), batch, 1)

    def decode(start: Callable[[], Sequences]) -> Callable[[], None]:
        sequences = start()
        sequences.append(batch)
        return partial(_extend, sequences, token, DECODE)

    return {name: paired(way(ours), way(theirs), pairs) for name, way in (("prefill", prefill), ("decode", decode))}


def _extend(sequences: Sequences, ids: Ids, times: int) -> None:
    for _ in range(times):
        sequences.append(ids)
