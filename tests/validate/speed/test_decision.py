"""The gate's decision rule, on simulated timings: how often it is wrong, and how often it sees what it should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.report.report import Verdict
from h1export.validate.speed.decision import ERROR, FIRST, Decision, decide, decide_all, looks, median_interval
from h1export.validate.speed.regression import BEST_OF

MOST = 128
LIMIT = 1.15
PLANTED = 1.3
Rng = np.random.Generator


def ratios(rng: Rng, true: float, noise: float, outliers: float, drift: float) -> np.ndarray:
    """MOST ratios of a busy machine: each time has noise and bursts, which only add; a shared load drifts."""
    load = np.exp(np.cumsum(rng.normal(0, drift, MOST)))  # a walk, which both sides of a pair see

    def times(seconds: float) -> np.ndarray:
        shape = (BEST_OF, MOST)
        bursts = np.where(rng.random(shape) < outliers, rng.uniform(1, 5, shape), 1)
        return seconds * load * (bursts * np.exp(rng.normal(0, noise, shape))).min(0)

    return times(true) / times(1.0)


def verdict(samples: np.ndarray, limit: float = LIMIT) -> Decision:
    found = iter(samples)
    return decide_all(lambda _: float(next(found)), {"x": limit}, MOST)["x"]


def share(seed: int, true: float, wanted: Verdict, trials: int = 200, limit: float = LIMIT, **noise: float) -> float:
    rng = np.random.default_rng(seed)
    kinds = {"noise": 0.08, "outliers": 0.1, "drift": 0.1} | noise
    return float(np.mean([verdict(ratios(rng, true, **kinds), limit).verdict is wanted for _ in range(trials)]))


def test_an_unchanged_build_passes_and_never_fails() -> None:
    assert share(0, 1.0, Verdict.PASS) > 0.99
    assert share(1, 1.0, Verdict.FAIL, noise=0.3, outliers=0.3) == 0
    assert share(2, 1.0, Verdict.PASS, noise=0.15, outliers=0.25) > 0.95


def test_a_slowdown_of_a_third_fails_and_never_passes() -> None:
    assert share(3, PLANTED, Verdict.FAIL) > 0.99
    assert share(4, PLANTED, Verdict.PASS, noise=0.3, outliers=0.3) == 0
    assert share(5, PLANTED, Verdict.FAIL, noise=0.15, outliers=0.25) > 0.9


def test_at_the_limit_it_says_that_it_cannot_say() -> None:
    rng = np.random.default_rng(6)
    found = [verdict(ratios(rng, LIMIT, 0.08, 0.1, 0.1)) for _ in range(400)]
    wrong = np.mean([decision.verdict is not Verdict.INCONCLUSIVE for decision in found])
    assert wrong <= ERROR + 4 * np.sqrt(ERROR / 400)
    assert all(
        decision.settle and decision.pairs == MOST for decision in found if decision.verdict is Verdict.INCONCLUSIVE
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.4), st.floats(0.0, 0.4), st.floats(0.0, 0.5))
def test_no_noise_turns_a_large_difference_round(seed: int, noise: float, outliers: float, drift: float) -> None:
    rng = np.random.default_rng(seed)
    assert verdict(ratios(rng, 0.7, noise, outliers, drift)).verdict is not Verdict.FAIL
    assert verdict(ratios(rng, 1.9, noise, outliers, drift)).verdict is not Verdict.PASS


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(11, 100),
    st.floats(0.002, 0.2),
    st.sampled_from(["normal", "standard_cauchy", "lognormal"]),
    st.integers(0, 2**32 - 1),
)
def test_the_interval_misses_the_median_as_seldom_as_it_says(n: int, error: float, law: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = 400
    true = 1.0 if law == "lognormal" else 0.0
    found = [median_interval(getattr(rng, law)(size=n).tolist(), error) for _ in range(trials)]
    missed = np.mean([not interval.low <= true <= interval.high for interval in found])
    assert missed <= error + 5 * np.sqrt(error / trials)  # 25 examples: 5 standard errors
    assert all(interval.low <= interval.median <= interval.high for interval in found)


def test_the_interval_is_no_wider_than_it_must_be() -> None:
    # Conover's table A3: for n = 20, p = 0.5 the ranks 6 and 15 hold the median with 0.9586
    assert median_interval(list(map(float, range(1, 21))), 0.05) == median_interval(
        list(map(float, range(20, 0, -1))), 0.05
    )
    found = median_interval(list(map(float, range(1, 21))), 0.05)
    assert (found.median, found.low, found.high) == (10.5, 6.0, 15.0)
    with pytest.raises(ValueError, match="5 samples"):
        median_interval([1.0] * 5, 0.05)


def test_looks_grow_and_end_at_the_budget() -> None:
    assert looks(64) == (12, 17, 24, 34, 48, 64)
    assert looks(MOST)[-1] == MOST
    assert looks(FIRST) == (FIRST,)
    for most in (12, 13, 64, 1000):
        median_interval([1.0] * FIRST, ERROR / len(looks(most)))  # the first look can already decide


def test_it_stops_when_it_knows() -> None:
    assert decide([1.0] * 11, LIMIT, MOST) is None
    passed = decide([1.0] * 12, LIMIT, MOST)
    failed = decide([1.3] * 12, LIMIT, MOST)
    assert passed is not None
    assert failed is not None
    assert (passed.verdict, passed.pairs, failed.verdict) == (Verdict.PASS, 12, Verdict.FAIL)
    assert decide([1.0] * 11 + [2.0], LIMIT, MOST) is None  # one outlier in twelve: more pairs
    late = decide([1.0] * 16 + [2.0], LIMIT, MOST)
    assert late is not None
    assert late.verdict is Verdict.PASS


def test_what_would_settle_it() -> None:
    near = decide([1.14, 1.17] * 32, 1.15, 64)
    assert near is not None
    assert near.settle.startswith("about ")
    assert int(near.settle.split()[1]) > 64
    exact = decide([1.1, 1.2] * 32, 1.15, 64)
    assert exact is not None
    assert "the limit itself" in exact.settle


def test_keys_take_turns_until_each_is_decided() -> None:
    order: list[str] = []
    values = {"fast": 1.0, "slow": 1.3, "at": 1.15}

    def measure(key: str) -> float:
        order.append(key)
        return values[key]

    found = decide_all(measure, dict.fromkeys(values, 1.15), 20)
    assert [found[key].verdict for key in values] == [Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE]
    assert order == list(values) * 12 + ["at"] * 8
