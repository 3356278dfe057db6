"""Sessions over any Runner: one that steps, one with states in place, and one that extends row by row.

All of them are ``BatchSession``s, and take one call at a time. A runtime that has states in place implements
``RestorableSession``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids, StateSpec
from h1export.runtime.generation import PREFILL_CHUNK
from h1export.runtime.runner import Restorable, RestorableSession, Runner, check_call, check_keep
from h1export.runtime.saved_states import SavedStates, check_part
from h1export.runtime.sharing import OneCall, one_call

WHAT = "session"  # in errors


class BatchSession(RestorableSession, Protocol):
    """A Session that also takes rows padded on the left, and returns as many logits as a caller wants.

    Like every Session it takes one call at a time; another one at the same moment raises.

    Attributes:
        length: The number of tokens and pads so far, which is the same for every row.
    """

    def append(self, ids: Ids, mask: Ids | None = None, keep: int | None = None) -> Array:
        """Extend every row by ids int64 [rows, new], and return logits float32 [rows, positions, vocab].

        Args:
            ids: The new tokens.
            mask: int64 [rows, length + new], 1 for real tokens, left padding only; None means that there are no pads.
                The logits at pads mean nothing.
            keep: The number of last positions whose logits are returned, ``new`` at most; None means as many as the
                Runner gives.

        Raises:
            H1ExportError: The Runner refuses the call, or gives fewer logits than ``keep``.
        """
        ...


def open_session(
    runner: Runner[Any], rows: int, capacity: int, *, padded: bool = False, movable: bool = False
) -> BatchSession:
    """Open an empty session for ``capacity`` tokens a row: the fastest one that takes such rows.

    Args:
        runner: The loaded artifact.
        rows: The number of sequences.
        capacity: The number of tokens, pads counted, that each of them may get.
        padded: Whether rows may have pads.
        movable: Whether rows may change places; the session is a ``RowByRowSession`` then.
    """
    limit = runner.limits.max_batch
    if movable or (limit is not None and (rows > limit or padded)):  # a runtime that takes single rows takes no pads
        return RowByRowSession(runner, rows)
    return SteppedSession(runner, rows) if padded else InPlaceSession(runner, rows, capacity)


class InPlaceSession:
    """A session without pads over ``Runner.start``, whose states are in buffers of fixed length: the fastest one."""

    def __init__(self, runner: Runner[Any], rows: int, capacity: int) -> None:
        self._all_logits = runner.limits.all_logits
        self._session = runner.start(rows, capacity)
        self._one_call = OneCall(WHAT)
        self.length = 0

    @one_call
    def append(self, ids: Ids, mask: Ids | None = None, keep: int | None = None) -> Array:
        _check_logits(self._all_logits, ids, keep)
        new = ids.shape[-1]
        if mask is not None and not mask.all():
            raise H1ExportError(
                "attention_mask", "has pads that the session was not opened for", "say so when it is opened"
            )
        answers = [
            self._session.append(ids[..., start:end], keep=None if keep is None else max(1, keep - (new - end)))
            for start, end in _calls(new, keep)
        ]
        self.length = self._session.length
        return _last(answers, keep)

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        return self._session.save(row, start)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        self._session.restore(saved)
        self.length = self._session.length


class SteppedSession:
    """A session over ``Runner.step``, for rows with pads, and for a runtime that has no states in place."""

    def __init__(self, runner: Runner[Any], rows: int) -> None:
        self._runner = runner
        self._states = runner.initial(rows)
        self._rows = rows
        self._padded = False
        self._one_call = OneCall(WHAT)
        self.length = 0

    @one_call
    def append(self, ids: Ids, mask: Ids | None = None, keep: int | None = None) -> Array:
        _check_logits(self._runner.limits.all_logits, ids, keep)
        pads = 0
        if mask is None:  # the Runner checks the ids
            mask = np.ones((self._rows, self.length + ids.shape[-1]), np.int64)
        else:
            check_call(ids, mask, self.length, vocab_size=self._runner.config.vocab_size)
            pads = int((mask == 0).sum(1).max())
            self._padded = self._padded or pads > 0
        answers = []
        # the first call reaches the first real token of every row
        for start, end in _calls(ids.shape[-1], keep, pads + 1 - self.length):
            seen = mask[:, : self.length + end - start]
            logits, self._states = _step(self._runner, ids[..., start:end], seen, states=self._states)
            answers.append(logits)
            self.length = seen.shape[1]
        return _last(answers, keep)

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        if self._padded:
            raise H1ExportError("save", "the rows have pads", "save the states of a session without pads")
        return _saved(self._runner, self._states, row, start=start)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        self._states = _restored(self._runner, saved, self._rows)
        self._padded = False
        self.length = saved.length

    @one_call
    def fork(self) -> SteppedSession:
        """Return another session whose rows go on from where these are; both share the states until they differ."""
        other = SteppedSession(self._runner, self._rows)
        other._states, other._padded, other.length = self._states, self._padded, self.length
        return other


class RowByRowSession:
    """A session that computes every row alone and without pads, for Runners of one row and rows that change places.

    ``Runner.step`` leaves its states usable, so rows share states for as long as they are equal, and are computed once.
    """

    def __init__(self, runner: Runner[Any], rows: int) -> None:
        self._runner = runner
        self._one_call = OneCall(WHAT)
        self.length = 0
        self._rows: list[tuple[int, Any]] = [(0, runner.initial(1))] * rows  # tokens so far without pads, states

    @one_call
    def append(self, ids: Ids, mask: Ids | None = None, keep: int | None = None) -> Array:
        _check_logits(self._runner.limits.all_logits, ids, keep)
        if mask is None:
            mask = np.ones((len(self._rows), self.length + ids.shape[-1]), np.int64)
        check_call(ids, mask, self.length, vocab_size=self._runner.config.vocab_size)
        if len(ids) != len(self._rows) or not mask[:, -1].all():
            raise H1ExportError(
                "attention_mask", "a row has no tokens, or the batch has other rows", "give each row at least one token"
            )
        if keep is None:
            keep = ids.shape[1] if self._runner.limits.all_logits else 1
        logits = np.zeros((len(ids), min(keep, ids.shape[1]), self._runner.config.vocab_size), np.float32)
        found: dict[tuple[int, bytes], tuple[Array, tuple[int, Any]]] = {}
        rows = []
        for row, (new, before) in enumerate(zip(ids, self._rows, strict=True)):
            real = new[mask[row, self.length :] == 1]
            key = id(before[1]), real.tobytes()
            if key not in found:
                found[key] = self._extend(real[None], before, keep)
            answer, after = found[key]
            logits[row, logits.shape[1] - len(answer) :] = answer
            rows.append(after)
        self._rows = rows
        self.length = self.length + ids.shape[1]
        return logits

    def _extend(self, ids: Ids, row: tuple[int, Any], keep: int) -> tuple[Array, tuple[int, Any]]:
        """Return logits [at most keep, vocab] of ids [1, new], and the row after them."""
        (past, states) = row
        answers = []
        for start, end in _calls(ids.shape[1], keep):
            logits, states = _step(self._runner, ids[:, start:end], np.ones((1, past + end), np.int64), states=states)
            answers.append(logits)
        return _last(answers, keep)[0], (past + ids.shape[1], states)

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        check_part(row, len(self._rows), start, length=self._rows[row][0] if row < len(self._rows) else 0)
        return _saved(self._runner, self._rows[row][1], 0, start=start)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        self._rows = [(saved.length, _restored(self._runner, saved, 1))] * len(self._rows)
        self.length = saved.length

    @one_call
    def fork(self) -> RowByRowSession:
        """Return another session whose rows go on from where these are; both share the states until they differ."""
        other = RowByRowSession(self._runner, len(self._rows))
        other._rows, other.length = list(self._rows), self.length
        return other

    @one_call
    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on from where row ``rows[i]`` is."""
        self._rows = [self._rows[row] for row in rows]


def _saved(runner: Runner[Any], states: Any, row: int, *, start: int) -> SavedStates:
    found = _restorable(runner).snapshot(states)
    return SavedStates.of(StateSpec.of(runner.config), found, row, start=start, length=runner.length(states))


def _restored(runner: Runner[Any], saved: SavedStates, rows: int) -> Any:
    saved.check(StateSpec.of(runner.config), runner.limits.max_context)
    return _restorable(runner).restored(saved, rows)


def _restorable(runner: Runner[Any]) -> Restorable[Any]:
    if not isinstance(runner, Restorable):
        raise H1ExportError("states", "this Runner cannot save them", "compute the whole sequence again")
    return runner


def _check_logits(all_logits: bool, ids: Ids, keep: int | None) -> None:
    """Check that there are logits of the last ``keep`` positions; raise H1ExportError where there are none."""
    check_keep(keep)
    if not all_logits and keep is not None and min(keep, ids.shape[-1]) > 1:
        what = f"logits of {keep} positions, and the artifact gives those of the last one only"
        raise H1ExportError("logits", what, "ask for the last one, or build with --logits all")


def _calls(new: int, keep: int | None, first: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the calls for ``new`` tokens, the first of which has at least ``first`` tokens.

    There is one call where all logits are kept, and calls of PREFILL_CHUNK tokens otherwise.
    """
    if keep is None or keep >= new:
        yield 0, new
        return
    start = 0
    while start < new:
        end = min(new, max(start + PREFILL_CHUNK, first))
        yield start, end
        start = end


def _step(runner: Runner[Any], ids: Ids, mask: Ids, *, states: Any) -> tuple[Array, Any]:
    return runner.step(np.ascontiguousarray(ids), np.ascontiguousarray(mask), states)


def _last(answers: Sequence[Array], keep: int | None) -> Array:
    """Return logits [rows, keep, vocab] of the last positions of ``answers``, the logits of consecutive calls.

    Where ``keep`` is None, there was one call, and its logits are returned as they are.
    """
    if keep is None:
        (answer,) = answers
        return answer
    wanted: list[Array] = []
    for answer in reversed(answers):
        if (missing := keep - sum(part.shape[1] for part in wanted)) > 0:
            wanted.insert(0, answer[:, -missing:])
    return np.concatenate(wanted, axis=1)
