"""ContinuedSequence: a sequence of tokens that grows and changes, of which only what is new is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.runtime.generation import calls
from h1export.runtime.growing import GrowingSession
from h1export.runtime.runner import Runner
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.sharing import OneCall, one_call

# Each has the states of the convolutions and scans, and all of them together one set of keys and values.
MOST_POINTS = 8


class StoppedError(Exception):
    """The caller stopped a computation between two calls; the states are those of the tokens before."""


@dataclass(frozen=True)
class Continued:
    """Tokens and their states, as a file stores them."""

    ids: tuple[int, ...]
    states: SavedStates


class ContinuedSequence:
    """One sequence over ``runner``, which goes on from where it agrees with the tokens that are asked for.

    It takes one call at a time; another one at the same moment raises H1ExportError.

    Attributes:
        ids: The tokens that the states have seen.
        computed: The number of tokens computed so far, those computed again counted again.
    """

    def __init__(self, runner: Runner[Any], saved: Continued | None = None) -> None:
        self._runner = runner
        self._spec = StateSpec.of(runner.config)
        self._points: list[SavedStates] = []  # consecutive parts; the states at the end of each can be restored
        self._session = GrowingSession(runner)
        self._one_call = OneCall("sequence")
        self.ids: list[int] = []
        self.computed = 0
        if saved is not None:
            self._session.restore(saved.states)
            self.ids = list(saved.ids)

    @property
    def context(self) -> int:
        """The largest number of tokens in the sequence."""
        return self._session.context

    @one_call
    def become(self, ids: Sequence[int], points: Sequence[int] = (), stop: Callable[[], bool] = lambda: False) -> Array:
        """Let the sequence be ``ids``, and return the logits after its last token, float32 [vocab].

        Args:
            ids: All tokens of the sequence.
            points: Lengths at which the states are saved on the way, to come back to.
            stop: Is asked before each call.

        Raises:
            StoppedError: ``stop`` said so.
            H1ExportError: There are no tokens, or they do not fit the context.
        """
        if not ids:
            raise H1ExportError("prompt", "has no tokens", "give at least one")
        if len(ids) >= self.context:
            raise H1ExportError("prompt", f"has {len(ids)} tokens, and the context is {self.context}", "shorten it")
        self._rewind(self._agreed(ids))
        self._session.reserve(len(ids) + 1)
        saved = sorted({point for point in points if len(self.ids) < point <= len(ids)})
        logits: Array | None = None
        for start, end in calls(len(self.ids), len(ids), saved):
            if stop():
                raise StoppedError
            logits = self._append(np.array([ids[start:end]], np.int64))
            if end in saved:
                self._save_point()
        assert logits is not None
        return logits

    @one_call
    def append(self, token: int) -> Array:
        """Extend the sequence by a token, and return the logits after it, float32 [vocab].

        Raises:
            H1ExportError: The context is full.
        """
        if len(self.ids) >= self.context:
            raise H1ExportError("append", f"the context of {self.context} tokens is full", "begin a new sequence")
        return self._append(np.array([[token]], np.int64))

    @one_call
    def save(self) -> Continued:
        """Return a copy of the sequence so far. Raises H1ExportError where it has no tokens."""
        if not self.ids:
            raise H1ExportError("save", "there are no tokens yet", "save after a reply")
        return Continued(tuple(self.ids), self._session.save())

    def _append(self, ids: Ids) -> Array:
        try:
            logits = self._session.append(ids, keep=1)
        except BaseException:  # the states may be those after the tokens, or in between
            self._forget()
            raise
        self.ids.extend(int(token) for token in ids[0])
        self.computed += ids.shape[1]
        return np.asarray(logits[0, -1])

    def _agreed(self, ids: Sequence[int]) -> int:
        """Return the length of the longest beginning of ``ids`` whose states are here, and which leaves a token."""
        known = [0, *(point.length for point in self._points), len(self.ids)]
        agreed = 0
        for length in sorted(set(known)):
            if length >= len(ids) or self.ids[agreed:length] != list(ids[agreed:length]):
                break
            agreed = length
        return agreed

    def _rewind(self, length: int) -> None:
        """Go back to a saved point, or to the beginning; later points are of another sequence then."""
        if length == len(self.ids):
            return
        self._points = [point for point in self._points if point.length <= length]
        if length:
            self._session.restore(SavedStates.joined(self._spec, self._points))
            del self.ids[length:]
        else:
            self._forget()

    def _forget(self) -> None:
        self._session = GrowingSession(self._runner)
        self._points = []
        self.ids = []

    def _save_point(self) -> None:
        self._points.append(self._session.save(start=self._points[-1].length if self._points else 0))
        if len(self._points) > MOST_POINTS:  # the first is the one to come back to when all else has changed
            self._points[1:3] = [SavedStates.joined(self._spec, self._points[1:3])]
