"""Decide whether something got slower: a sequential test on paired timings.

Each pair of timings gives one ratio. After each number of pairs in ``looks`` the interval of their median is compared
with the limit: an interval below it passes, one above it fails, and one around it needs more pairs. The interval is
that of order statistics, which is exact for any independent noise, so that outliers only widen it (Conover, Practical
Nonparametric Statistics, 3rd edition, 3.2). Every look spends an equal part of ERROR (Bonferroni), so that looking
often does not make wrong verdicts likelier.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb
from typing import TypeVar

import numpy as np

from h1export.report.report import Verdict
from h1export.validate.speed.statistics import Estimate

# probability of a wrong verdict over all looks where the true ratio is the limit itself; elsewhere it is smaller
ERROR = 0.01
FIRST = 12  # pairs before the first look; below 11 pairs no interval reaches this error
GROWTH = 1.4  # from look to look

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Decision:
    """The verdict, and the median of ``pairs`` ratios; ``settle``: what would settle an inconclusive verdict."""

    verdict: Verdict
    estimate: Estimate
    limit: float
    pairs: int
    settle: str = ""


def looks(most: int) -> tuple[int, ...]:
    """Return the numbers of pairs after which to look; the last is ``most``, which is at least FIRST."""
    found = [FIRST]
    while found[-1] < most:
        found.append(min(most, ceil(found[-1] * GROWTH)))
    return tuple(found)


def median_interval(samples: Sequence[float], error: float) -> Estimate:
    """Return the median of ``samples`` and its narrowest symmetric interval.

    The interval misses the true median with at most probability ``error``.

    Raises:
        ValueError: too few samples for any such interval.
    """
    n = len(samples)
    rank = 0
    tail = 0.0
    while (tail := tail + comb(n, rank) / 2**n) * 2 <= error:
        rank += 1
    if not rank:
        raise ValueError(f"{n} samples have no interval with error {error}")
    ordered = np.sort(np.asarray(samples, np.float64))
    return Estimate(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[n - rank]))


def decide(samples: Sequence[float], limit: float, most: int) -> Decision | None:
    """Return the verdict on the ratios so far, of which there will be ``most`` at most; None: not yet."""
    places = looks(most)
    if len(samples) not in places:
        return None
    found = median_interval(samples, ERROR / len(places))
    if found.high < limit:
        return Decision(Verdict.PASS, found, limit, pairs=len(samples))
    if found.low > limit:
        return Decision(Verdict.FAIL, found, limit, pairs=len(samples))
    if len(samples) < most:
        return None
    return Decision(Verdict.INCONCLUSIVE, found, limit, pairs=most, settle=_settle(found, limit, most))


def _settle(found: Estimate, limit: float, pairs: int) -> str:
    """Return what would settle it: intervals narrow with the root of the number of pairs, down to |median - limit|."""
    distance = abs(found.median - limit)
    needed = pairs * ((found.high - found.low) / 2 / distance) ** 2 if distance else float("inf")
    if needed > 100 * pairs:
        what = "the ratio is the limit itself: no number of pairs will settle it"
        return f"{what}; choose another limit, or find what changed"
    more = max(ceil(needed), pairs + 1)
    width = f"the interval is {found.spread:.1%} wide each way"
    return f"about {more} pairs would settle it, or an idle machine: {width}"


def decide_all(measure: Callable[[K], float], limits: Mapping[K, float], most: int) -> dict[K, Decision]:
    """Measure one ratio of every key in turns, until each is decided, ``most`` of each at most."""
    samples: dict[K, list[float]] = {key: [] for key in limits}
    decisions: dict[K, Decision] = {}
    while open_keys := [key for key in limits if key not in decisions]:
        for key in open_keys:
            samples[key].append(measure(key))
            decision = decide(samples[key], limits[key], most)
            if decision is not None:
                decisions[key] = decision
    return {key: decisions[key] for key in limits}
