"""How far two sets of logits are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from h1export.model.falcon_h1.states import Array


def relative_error(found: Array, truth: Array) -> float:
    """Return the largest absolute difference over the truth's range; NaN or infinite where either is not finite."""
    if not found.size:
        return 0.0
    span = float(truth.max() - truth.min())
    worst = float(np.abs(found - truth).max())
    return worst / span if span > 0 else worst


def log_softmax(logits: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def position_errors(pairs: Sequence[tuple[Array, Array]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the largest difference of every position over the range of its (found, truth) pair."""
    return np.concatenate(
        [np.abs(found - truth).max(-1).astype(np.float64) / (float(np.ptp(truth)) or 1.0) for found, truth in pairs]
    )


def logit_figures(pairs: Sequence[tuple[Array, Array]]) -> dict[str, float]:
    """Return the figures of (found, truth) pairs of logits [positions, vocab].

    logits: relative_error, the worst pair. top1: share of positions with the same argmax. kl: mean KL(truth || found)
        in nats.
    """
    agree = []
    kl = []
    for found, truth in pairs:
        for row in range(0, len(truth), 256):  # float64 copies of a few rows at a time
            a = log_softmax(found[row : row + 256])
            b = log_softmax(truth[row : row + 256])
            agree.append(a.argmax(-1) == b.argmax(-1))
            kl.append((np.exp(b) * (b - a)).sum(-1))
    return {
        "logits": max(relative_error(found, truth) for found, truth in pairs),
        "top1": float(np.concatenate(agree).mean()),
        "kl": max(0.0, float(np.concatenate(kl).mean())),
    }
