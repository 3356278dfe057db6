"""The median of repeated measurements, and its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A median of samples and the interval [low, high] that holds the true one with probability CONFIDENCE."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the width of the interval relative to the median: 0.05 reads as plus or minus 5 %."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def estimate(samples: Sequence[float], seed: int = 0) -> Estimate:
    """Return the median and the percentile bootstrap interval of at least one sample.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = np.asarray(samples, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Estimate(float(np.median(values)), float(low), float(high))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Estimate ours[i] / theirs[i], two samples of one round, so that what slows a round down affects both."""
    return estimate([a / b for a, b in zip(ours, theirs, strict=True)])
