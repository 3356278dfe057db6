"""Bits per byte over a text."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from h1export.core.protocols import Ids
from h1export.core.state import Array
from h1export.validate.logits import log_softmax

WINDOW = 512  # tokens a window; each starts from empty states with the last token of the one before

ScoreWindow = Callable[[Ids], Array]  # ids [seq] -> logits [seq, vocab]


def bits_per_byte(score: ScoreWindow, ids: Ids, nbytes: int) -> float:
    """Negative log likelihood of all tokens but the first, in bits, over the ``nbytes`` that they stand for."""
    nats = sum(window_nats(score(window), window) for window in windows(ids))
    return nats / math.log(2) / nbytes


def windows(ids: Ids) -> list[Ids]:
    return [ids[start : start + WINDOW + 1] for start in range(0, len(ids) - 1, WINDOW)]


def window_nats(logits: Array, window: Ids) -> float:
    """-sum log p(window[1:]) given the logits of window[:-1] (those of the last token, if there, are not needed)."""
    targets: npt.NDArray[np.int64] = window[1:]
    return -sum(
        float(log_softmax(logits[start : start + 256][: len(targets) - start])[np.arange(len(part)), part].sum())
        for start in range(0, len(targets), 256)
        if (part := targets[start : start + 256]).size
    )
