"""A planted slowdown: a model that does its work more than once, as a change that makes it slower would."""

from __future__ import annotations

from h1export.core.protocols import Capabilities, Ids, Sequences
from h1export.core.spec import HybridSpec
from h1export.core.state import Array
from h1export.validate.players import Timed


class Slowed:
    """``model``, computing ``factor`` times as many tokens as it is asked for."""

    def __init__(self, model: Timed, factor: float) -> None:
        self._model, self._factor = model, factor

    @property
    def spec(self) -> HybridSpec:
        return self._model.spec

    @property
    def capabilities(self) -> Capabilities:
        return self._model.capabilities

    def start(self, batch: int, capacity: int) -> Sequences:
        return SlowedSequences(self._model.start(batch, capacity), self._model.start(batch, capacity), self._factor - 1)


class SlowedSequences:
    """Appends to ``sequences`` what it is given, and of that the part ``more`` to ``others`` too: of single tokens, every few."""

    def __init__(self, sequences: Sequences, others: Sequences, more: float) -> None:
        self._sequences, self._others, self._more, self._owed = sequences, others, more, 0.0

    @property
    def length(self) -> int:
        return self._sequences.length

    def append(self, ids: Ids) -> Array:
        self._owed += self._more * ids.shape[1]
        again = int(self._owed)
        if again:
            self._others.append(ids[:, :again])
            self._owed -= again
        return self._sequences.append(ids)
