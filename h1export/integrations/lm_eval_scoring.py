"""The log likelihood of a text by any Runner, for lm_eval.py.

Texts that begin alike share the states of their prefix, because ``Runner.step`` leaves its states usable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.generation import PREFILL_CHUNK
from h1export.runtime.runner import Runner
from h1export.validate.accuracy.logits import log_softmax

NOTHING = (0.0, True)  # log likelihood and greediness of no tokens


@dataclass(frozen=True)
class Score:
    """The natural log of the probability of all tokens, and whether each of them was the likeliest one."""

    log_likelihood: float
    greedy: bool


class Prefix:
    """The text before the texts that are scored: ids int64 [seq], with one token at least."""

    def __init__(self, runner: Runner[Any], ids: Ids) -> None:
        if not len(ids):
            raise H1ExportError("context", "has no tokens", "give at least one")
        self._runner = runner
        self._states = runner.initial(1)
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits, self._states = self._step(ids[start : start + PREFILL_CHUNK], self._states)
        self._last = logits[-1:]

    def _step(self, ids: Ids, states: Any) -> tuple[Array, Any]:
        """Return logits [new or 1, vocab] of ids [new], and the states after them."""
        mask = np.ones((1, self._runner.length(states) + len(ids)), np.int64)
        logits, states = self._runner.step(ids[None], mask, states)
        return logits[0], states

    def score(self, ids: Ids) -> Score:
        """Return the score of ``ids`` [seq] as the continuation of the prefix."""
        found = [_score(logits, targets) for logits, targets in self._logits(ids)]
        return Score(sum(part.log_likelihood for part in found), all(part.greedy for part in found))

    def _logits(self, ids: Ids) -> Iterator[tuple[Array, Ids]]:
        """Yield logits [n, vocab] with the n tokens that they predict, from the first to the last of ``ids``."""
        yield self._last[: len(ids)], ids[:1]
        states = self._states
        chunk = PREFILL_CHUNK if self._runner.limits.all_logits else 1
        for start in range(0, len(ids) - 1, chunk):
            end = min(start + chunk, len(ids) - 1)
            logits, states = self._step(ids[start:end], states)
            yield logits, ids[start + 1 : end + 1]


def _score(logits: Array, targets: Ids) -> Score:
    likelihoods = log_softmax(logits)[np.arange(len(targets)), targets]
    return Score(float(likelihoods.sum()), bool((logits.argmax(-1) == targets).all()))
