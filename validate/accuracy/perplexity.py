"""Score one text with two models: bits per byte, and the divergence of their predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from h1export.model.falcon_h1.states import Array, Ids
from h1export.validate.accuracy.logits import log_softmax

WINDOW = 512  # tokens a window; each starts from empty states with the last token of the one before
POSITIONS = 256  # positions whose probabilities are held in float64 at a time
KL_QUANTILE = 0.99  # the share of positions that "kl_p99" covers
LIKELIEST = 5  # tokens of a prediction that "top5" compares
RESAMPLES = 500  # of the bootstrap

ScoreWindow = Callable[[Ids], Array]  # ids [seq] -> logits [seq, vocab]
Figures = npt.NDArray[np.float64]


def windows(ids: Ids) -> list[Ids]:
    """Cut a text into windows that overlap by a token, so that every token but the first is scored once."""
    return [ids[start : start + WINDOW + 1] for start in range(0, len(ids) - 1, WINDOW)]


@dataclass(frozen=True)
class Scored:
    """The scores of two models on the tokens of one window, each [tokens].

    Attributes:
        found: -ln p of the token by the model that is judged.
        truth: -ln p of the token by the reference.
        kl: KL(truth || found) of the whole predictions, in nats.
        same: whether the likeliest token of both is the same.
        shared: share of one model's LIKELIEST tokens that are among the other's.
        error: largest difference of a logit, over the range of the window's true logits.
    """

    found: Figures
    truth: Figures
    kl: Figures
    same: npt.NDArray[np.bool_]
    shared: Figures
    error: Figures

    @classmethod
    def of(cls, found: Array, truth: Array, window: Ids) -> Scored:
        """Score the logits [seq, vocab] of ``window[:-1]``; a further row, that of the last token, is not used."""
        targets = window[1:]
        found = found[: len(targets)]
        truth = truth[: len(targets)]
        span = float(np.ptp(truth)) or 1.0
        parts = [
            _scored(found[s : s + POSITIONS], truth[s : s + POSITIONS], targets[s : s + POSITIONS], span=span)
            for s in range(0, len(targets), POSITIONS)
        ]
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _scored(found: Array, truth: Array, targets: Ids, *, span: float) -> tuple[npt.NDArray[Any], ...]:
    """Return the columns of Scored for a few positions."""
    count = np.arange(len(targets))
    a = log_softmax(found)
    b = log_softmax(truth)
    ours, theirs = (torch.from_numpy(side).topk(min(LIKELIEST, side.shape[1])).indices.numpy() for side in (a, b))
    shared = (ours[:, :, None] == theirs[:, None, :]).any(2).mean(1)
    error = np.abs(found.astype(np.float64) - truth).max(-1) / span
    return (
        -a[count, targets],
        -b[count, targets],
        (np.exp(b) * (b - a)).sum(-1),
        a.argmax(-1) == b.argmax(-1),
        shared,
        error,
    )


def text_figures(scored: Iterable[Scored], nbytes: int) -> dict[str, float]:
    """Return the figures of a text of ``nbytes`` bytes.

    Names that end with "_se" are standard errors, by a bootstrap over whole windows.

    artifact, reference: bits per byte. ratio: the first to the second. kl: mean, in nats. kl_p99: its 99th percentile
    over positions. top1: share of positions with the same likeliest token. top5: share of the five likeliest tokens
    that both models have.

    Source of the bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 8.
    """
    kept = list(scored)
    draws = np.random.default_rng(0).integers(0, len(kept), (RESAMPLES, len(kept)))
    figures = _figures(kept)
    samples = [_figures([kept[window] for window in draw]) for draw in draws]
    errors = {f"{name}_se": float(np.std([sample[name] for sample in samples])) for name in figures}
    bits = math.log(2) * nbytes
    found, truth = (
        sum(float(nats.sum()) for nats in side) / bits for side in zip(*((w.found, w.truth) for w in kept), strict=True)
    )
    return {"artifact": found, "reference": truth, **figures, **errors}


def _figures(kept: list[Scored]) -> dict[str, float]:
    kl = np.concatenate([window.kl for window in kept])
    return {
        "ratio": sum(float(window.found.sum()) for window in kept) / sum(float(window.truth.sum()) for window in kept),
        "kl": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, KL_QUANTILE)),
        "top1": float(np.concatenate([window.same for window in kept]).mean()),
        "top5": float(np.concatenate([window.shared for window in kept]).mean()),
    }
