"""Agreement of choices: judged where there are enough tokens to tell, and not at ties."""

from __future__ import annotations

from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Row, Verdict
from h1export.validate.accuracy.agreement import ERROR, FEWEST, judged, least_agreement, least_successes, ties
from h1export.validate.accuracy.logits import logit_figures

TOLERANCES = {"drift.logits": 0.08, "drift.kl": 0.05, "drift.top1": 0.75}


def below(successes: int, trials: int, share: float) -> Fraction:
    """The exact probability of fewer successes than that."""
    p = Fraction(share)
    return sum((comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(successes)), start=Fraction(0))


@settings(deadline=None)
@given(trials=st.integers(0, 200), share=st.sampled_from([0.01, 0.5, 0.75, 0.9, 0.99, 0.999]))
def test_the_fewest_successes_are_those_of_the_binomial_law(trials: int, share: float) -> None:
    """One fewer would have a probability below ERROR, and the count itself has not."""
    fewest = least_successes(trials, share)
    assert 0 <= fewest <= trials
    assert below(fewest, trials, share) < ERROR <= below(fewest + 1, trials, share)


def test_shares_at_and_beyond_the_ends() -> None:
    assert [least_successes(9, share) for share in (-1.0, 0.0, 1.0, 2.0)] == [0, 0, 9, 9]
    assert [least_successes(n, 0.75) for n in (0, 1, 3, 6)] == [0, 0, 0, 0]
    assert least_successes(512, 0.75) == 347


def choices(*rows: tuple[float, ...]) -> Any:
    return np.array(rows, np.float32)


@pytest.mark.parametrize(
    ("found", "truth", "count"),
    [
        ((1.0, 0.0, 0.0), (1.0, 0.5, 0.0), 0),  # the same choice
        ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), 0),  # another choice, as far away as the drift
        ((0.9, 1.0, 0.0), (1.0, 0.9, 0.0), 0),  # both moved by the gap, so one of them moved no more than it
        ((0.9, 1.0, 0.2), (1.0, 0.9, 0.0), 1),  # another logit moved further
        ((0.9, 1.1, 0.0), (1.0, 0.95, 0.0), 1),
        ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0), 0),  # an exact tie that both resolve alike
        ((1.0, 1.01, 0.0), (1.0, 1.0, 0.0), 1),
        ((np.nan, 1.0, 0.0), (1.0, 1.0, 0.0), 0),
        ((0.0, 9.0, 0.0), (9.0, 0.0, 0.0), 0),
    ],
    ids=repr,
)
def test_a_tie_is_a_gap_below_the_drift(found: Any, truth: Any, count: int) -> None:
    found, truth = (np.array([row], np.float64) for row in (found, truth))
    assert ties(found, truth) == count


def verdict(found: Any, truth: Any) -> Verdict:
    """What the choices alone say; where they say nothing, the logits' error passes."""
    pairs = [(found, truth)]
    figures = {name: value for name, value in logit_figures(pairs).items() if name != "kl"}
    chosen = judged(figures, pairs, Comparison.DRIFT, tolerances=TOLERANCES)
    assert chosen["logits"] == TOLERANCES["drift.logits"]
    return Row(CheckKind.CASE, Comparison.DRIFT, figures=figures, tolerances=chosen).verdict


@pytest.mark.parametrize("positions", [1, 2, 3, 5])
def test_a_few_positions_are_not_judged(positions: int) -> None:
    truth = np.tile(choices((1.0, 0.99, -9.0)), (positions, 1))
    found = np.tile(choices((0.98, 1.0, -9.0)), (positions, 1))
    assert logit_figures([(found, truth)])["top1"] == 0
    assert verdict(found, truth) is Verdict.PASS


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), positions=st.integers(1, 600), vocab=st.sampled_from([2, 97, 259]))
def test_noise_within_the_tolerance_never_fails(seed: int, positions: int, vocab: int) -> None:
    """Whatever the model is, flat or sharp; the noise is that of a right artifact, as large as is tolerated."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((positions, vocab)) * rng.choice([0.01, 1.0])
    noise = rng.uniform(-1, 1, truth.shape) * 0.079 * np.ptp(truth)
    assert verdict((truth + noise).astype(np.float32), truth.astype(np.float32)) is Verdict.PASS


@settings(deadline=None)
@given(vocab=st.integers(2, 97), positions=st.integers(20, 300), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_choices_that_are_all_wrong_fail(vocab: int, positions: int, scale: float) -> None:
    """The two likeliest logits of every position change places, which moves each by the gap, and nothing else."""
    rng = np.random.default_rng(vocab)
    truth = rng.standard_normal((positions, vocab)).astype(np.float32) * np.float32(scale)
    order = truth.argsort(-1)
    rows = np.arange(positions)
    found = truth.copy()
    found[rows, order[:, -1]] = truth[rows, order[:, -2]]
    found[rows, order[:, -2]] = truth[rows, order[:, -1]]
    figures = {"top1": logit_figures([(found, truth)])["top1"]}
    chosen = judged(figures, [(found, truth)], Comparison.DRIFT, tolerances=TOLERANCES)
    assert Row(CheckKind.CASE, Comparison.DRIFT, figures=figures, tolerances=chosen).verdict is Verdict.FAIL


def test_ties_are_no_trials() -> None:
    """100 positions, of which 60 are ties that fall the other way: the other 40 are judged."""
    truth = np.concatenate([np.tile(choices((1.0, 0.99, 0.0)), (60, 1)), np.tile(choices((5.0, 0.0, 0.0)), (40, 1))])
    found = truth.copy()
    found[:60] = choices((0.98, 1.0, 0.1))
    pairs = [(found[:50], truth[:50]), (found[50:], truth[50:])]
    assert least_agreement(pairs, 0.75) == least_successes(40, 0.75) / 100
    found[60:80] = choices((0.0, 5.0, 0.0))
    assert logit_figures(pairs)["top1"] == 0.2
    assert least_agreement(pairs, 0.75) == least_successes(40, 0.75) / 100 == pytest.approx(0.2, abs=0.02)


def test_a_chosen_tolerance_is_the_probability() -> None:
    truth = np.tile(choices((1.0, 0.0)), (200, 1))
    found = truth.copy()
    found[:10] = choices((0.0, 1.0))
    figures = {"top1": 0.95}
    for share, judgement in ((0.75, Verdict.PASS), (0.95, Verdict.PASS), (1.0, Verdict.FAIL), (0.999, Verdict.FAIL)):
        chosen = judged(figures, [(found, truth)], Comparison.SOURCE, tolerances={"source.top1": share})
        assert Row(CheckKind.CASE, Comparison.SOURCE, figures=figures, tolerances=chosen).verdict is judgement


@pytest.mark.parametrize(("positions", "is_judged"), [(1, False), (3, False), (FEWEST - 1, False), (FEWEST, True)])
def test_the_mean_divergence_is_judged_where_it_is_one(positions: int, is_judged: bool) -> None:
    truth = np.tile(choices((3.0, 0.0)), (positions, 1))
    pairs = [(truth[:1] + 1, truth[:1]), (truth[1:], truth[1:])] if positions > 1 else [(truth, truth)]
    chosen = judged({"kl": 0.9}, pairs, Comparison.DRIFT, tolerances=TOLERANCES)
    assert chosen == ({"kl": 0.05} if is_judged else {})
