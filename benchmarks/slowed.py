"""A planted slowdown: a model that takes longer for its work, exactly by a factor."""

from __future__ import annotations

import time

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.runner import Limits, Provenance, Session
from h1export.validate.speed.worker import StartableModel


class Slowed:
    """``model`` on one CPU thread, with every call ``factor`` times as long in CPU time."""

    def __init__(self, model: StartableModel, factor: float) -> None:
        self._model = model
        self._factor = factor

    @property
    def config(self) -> FalconH1Config:
        return self._model.config

    @property
    def limits(self) -> Limits:
        return self._model.limits

    @property
    def provenance(self) -> Provenance:
        return self._model.provenance

    def start(self, batch: int, capacity: int) -> Session:
        return SlowedSession(self._model.start(batch, capacity), self._factor)


class SlowedSession:
    """A session with a loop after each call.

    Doing a part of the work again would cost less, because its weights are in the cache by then.
    """

    def __init__(self, sequences: Session, factor: float) -> None:
        self._sequences = sequences
        self._factor = factor

    @property
    def length(self) -> int:
        return self._sequences.length

    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        start = time.process_time()
        logits = self._sequences.append(ids, keep=keep)
        end = start + self._factor * (time.process_time() - start)
        while time.process_time() < end:
            pass
        return logits
