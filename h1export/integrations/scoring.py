"""How likely a text is to any Runner. Texts that begin alike share the beginning, because ``Runner.step`` leaves its states usable."""

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


@dataclass(frozen=True)
class Score:
    """Natural log of the probability of all tokens, and whether each was the likeliest one."""

    log_likelihood: float
    greedy: bool


class Beginning:
    """The text before what is scored: ids int64 [seq], one at least."""

    def __init__(self, runner: Runner[Any], ids: Ids) -> None:
        if not len(ids):
            raise H1ExportError("context", "has no tokens", "give at least one")
        self._runner = runner
        self._states = runner.initial(1)
        self._length = 0
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits, self._states, self._length = self._step(
                ids[start : start + PREFILL_CHUNK], self._states, self._length
            )
        self._last = logits[-1:]

    def _step(self, ids: Ids, states: Any, past: int) -> tuple[Array, Any, int]:
        """Logits [new or 1, vocab] of ids [new], the states and the length after them."""
        end = past + len(ids)
        logits, states = self._runner.step(ids[None], np.ones((1, end), np.int64), states)
        return logits[0], states, end

    def score(self, ids: Ids) -> Score:
        """``ids`` [seq] as what comes next."""
        found = [_score(logits, targets) for logits, targets in self._logits(ids)]
        return Score(sum(part.log_likelihood for part in found), all(part.greedy for part in found))

    def _logits(self, ids: Ids) -> Iterator[tuple[Array, Ids]]:
        """(logits [n, vocab], the n tokens that they are about), from the first to the last of ``ids``."""
        yield self._last[: len(ids)], ids[:1]
        states = self._states
        length = self._length
        chunk = PREFILL_CHUNK if self._runner.limits.all_logits else 1
        for start in range(0, len(ids) - 1, chunk):
            end = min(start + chunk, len(ids) - 1)
            logits, states, length = self._step(ids[start:end], states, length)
            yield logits, ids[start + 1 : end + 1]


def _score(logits: Array, targets: Ids) -> Score:
    likelihoods = log_softmax(logits)[np.arange(len(targets)), targets]
    return Score(float(likelihoods.sum()), bool((logits.argmax(-1) == targets).all()))
