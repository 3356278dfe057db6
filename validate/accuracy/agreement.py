"""Judge figures over positions only where there are enough of them to tell, and choices of tokens not at ties.

Two models that compute the same function within rounding choose different tokens where two logits are nearly equal.
Such a position says nothing. The others are trials of a binomial distribution, whose probability of agreement the
tolerance names: a few of them may differ by chance, and of one or three of them all may. Source: Clopper and Pearson,
The use of confidence or fiducial limits illustrated in the case of the binomial, Biometrika 26, 1934.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from h1export.model.falcon_h1.states import Array
from h1export.report.checks import Comparison
from h1export.report.report import KL

TOP1 = "top1"
# Positions of which the mean divergence is judged. Single positions scatter: on text, one in a hundred diverges by many
# times the mean.
FEWEST = 16
# probability that a model whose true agreement is the tolerance itself fails one check; a report has up to 24 of them
ERROR = 1e-4


def judged(
    figures: Mapping[str, float],
    pairs: Sequence[tuple[Array, Array]],
    comparison: Comparison,
    *,
    tolerances: Mapping[str, float],
) -> dict[str, float]:
    """Return figure -> tolerance for the ``figures`` of (found, truth) pairs of logits [positions, vocab].

    That of TOP1 is ``least_agreement``. It and that of KL are left out where the pairs have too few positions to judge.
    """
    chosen = {name: tolerances[metric] for name in figures if (metric := f"{comparison}.{name}") in tolerances}
    if sum(len(truth) for _, truth in pairs) < FEWEST:
        chosen.pop(KL, None)
    if TOP1 in chosen:
        least = least_agreement(pairs, chosen.pop(TOP1))
        chosen |= {TOP1: least} if least > 0 else {}
    return chosen


def least_agreement(pairs: Sequence[tuple[Array, Array]], share: float) -> float:
    """Return the least share of positions with the same choice that is no evidence against the probability ``share``.

    0 means that there are too few positions to judge.
    """
    positions = sum(len(truth) for _, truth in pairs)
    told = positions - sum(ties(found, truth) for found, truth in pairs)
    return least_successes(told, share) / positions if told else 0.0


def ties(found: Array, truth: Array) -> int:
    """Count the positions at which the choices differ, and their true logits by less than the drift.

    The drift is the largest difference of a logit at the position, which is all that it takes to swap two tokens.
    """
    rows = np.arange(len(truth))
    ours, theirs = found.argmax(-1), truth.argmax(-1)
    gap = truth[rows, theirs] - truth[rows, ours]
    return int(((ours != theirs) & (gap < np.abs(found - truth).max(-1))).sum())


def least_successes(trials: int, share: float) -> int:
    """Return the fewest successes in ``trials`` of probability ``share`` or more that come by chance.

    That many or fewer have at least the probability ERROR.
    """
    if not 0 < share < 1:
        return trials if share >= 1 else 0
    counts = torch.arange(trials + 1, dtype=torch.float64)
    law: Any = torch.distributions.Binomial(trials, probs=torch.tensor(share, dtype=torch.float64))
    chances = law.log_prob(counts).exp().cumsum(0)
    return int(torch.searchsorted(chances, ERROR))
