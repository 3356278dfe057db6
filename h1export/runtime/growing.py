"""GrowingSession: a session of one sequence that gets room as it needs it, and forks without a copy of its own."""

from __future__ import annotations

from typing import Any

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.runtime.runner import RestorableSession, Runner
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.sharing import OneCall, one_call

LEAST_CAPACITY = 256  # tokens


class GrowingSession:
    """A RestorableSession of one row over ``runner``, whose capacity doubles until the context is full.

    Forks share one copy of the states until they are extended, each for the first time (copy on write), and so does a
    session that was restored and not extended yet. It takes one call at a time, like every session.

    Attributes:
        length: The number of tokens so far.
    """

    def __init__(self, runner: Runner[Any]) -> None:
        self._runner = runner
        self._spec = StateSpec.of(runner.config)
        self._session: RestorableSession | None = None
        self._capacity = 0
        self._shared: SavedStates | None = None  # states that are those of the session, or that it will begin with
        self._one_call = OneCall("session")
        self.length = 0

    @property
    def context(self) -> int:
        """The largest number of tokens in the sequence."""
        limit = self._runner.limits.max_context
        longest = self._runner.config.max_position_embeddings
        return longest if limit is None else min(limit, longest)

    @one_call
    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        """Extend the sequence by ids int64 [1, new], and return logits float32 [1, positions, vocab].

        Raises:
            H1ExportError: The context is full, or the session refuses the call.
        """
        end = self.length + ids.shape[-1]
        if end > self.context:
            what = f"{end} tokens, and the context is {self.context}"
            raise H1ExportError("append", what, "begin a new sequence")
        session = self._reserve(end)
        self._shared = None  # whatever comes of the call, these are no longer its states
        logits = session.append(ids, keep=keep)
        self.length = end
        return logits

    @one_call
    def reserve(self, tokens: int) -> None:
        """Make room for a sequence of ``tokens``, as far as the context has it, before it is extended in parts."""
        self._reserve(min(tokens, self.context))

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        if self._shared is None or row or not 0 <= start < self.length:
            if self._session is None:
                raise H1ExportError("save", "there is no such token", "save after a token")
            return self._session.save(row, start)
        if start == 0:
            return self._shared
        return SavedStates.of(self._spec, self._shared.arrays, 0, start=start, length=self.length)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        saved.check(self._spec, self.context)
        self._session = None if saved.length > self._capacity else self._session
        if self._session is not None:
            self._session.restore(saved)
        self._shared = saved
        self.length = saved.length

    @one_call
    def fork(self) -> GrowingSession:
        """Return another session that goes on from here."""
        other = GrowingSession(self._runner)
        if self.length:
            if self._shared is None:
                assert self._session is not None
                self._shared = self._session.save()
            other._shared = self._shared
            other.length = self.length
        return other

    def _reserve(self, tokens: int) -> RestorableSession:
        """Return the session, with room for ``tokens``; a longer one takes over where it must."""
        if self._session is None or tokens > self._capacity:
            saved = self._shared
            if saved is None and self.length:
                assert self._session is not None
                saved = self._session.save()
            capacity = min(self.context, max(tokens, 2 * self._capacity, LEAST_CAPACITY))
            session = self._runner.start(1, capacity)
            if saved is not None:
                session.restore(saved)
            self._session, self._capacity = session, capacity
        return self._session
