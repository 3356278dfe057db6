"""A batch of rows being extended by any Runner: padded on the left, more of them than it takes, or with rows that change places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.runtime.generation import PREFILL_CHUNK
from h1export.runtime.runner import Ids, Runner, check_call


class Batch(Protocol):
    """Rows of one length, pads counted.

    Attributes:
        length: tokens and pads so far, the same for every row.
    """

    length: int

    def append(self, ids: Ids, mask: Ids, keep: int) -> Array:
        """Logits float32 [rows, min(keep, new), vocab] of the last ``keep`` positions of ids int64 [rows, new].

        ``mask`` int64 [rows, length + new]: 1 for real tokens, left padding only. Logits at pads mean nothing.

        Raises:
            H1ExportError: what the Runner refuses, or more logits than the artifact gives.
        """
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i goes on from where row ``rows[i]`` is. Raises H1ExportError in a batch that is not movable."""
        ...


def open_batch(runner: Runner[Any], rows: int, capacity: int, *, padded: bool = False, movable: bool = False) -> Batch:
    """An empty batch for ``capacity`` tokens a row, in the fastest form that allows pads and movable rows where they are asked for."""
    limit = runner.capabilities.max_batch
    if movable or (limit is not None and (rows > limit or padded)):  # one that takes single rows takes no pads
        return RowByRow(runner, rows)
    return Stepped(runner, rows) if padded else InPlace(runner, rows, capacity)


class InPlace:
    """No pads, states in buffers of fixed length: the fastest."""

    def __init__(self, runner: Runner[Any], rows: int, capacity: int) -> None:
        self._all_logits = runner.capabilities.all_logits
        self._sequences = runner.start(rows, capacity)
        self.length = 0

    def append(self, ids: Ids, mask: Ids, keep: int) -> Array:
        _check_logits(self._all_logits, ids, keep)
        if not mask.all():
            raise H1ExportError(
                "attention_mask", "has pads that the batch was not opened for", "say so when it is opened"
            )
        answers = [self._sequences.append(ids[:, start:end]) for start, end in _calls(ids.shape[1], keep)]
        self.length = self._sequences.length
        return _last(answers, keep)

    def reorder(self, rows: Sequence[int]) -> None:
        raise H1ExportError("reorder", "rows with states in place cannot change places", "open a movable batch")


class Stepped:
    """Rows padded on the left, by ``Runner.step``."""

    def __init__(self, runner: Runner[Any], rows: int) -> None:
        self._runner = runner
        self._states = runner.initial(rows)
        self.length = 0

    def append(self, ids: Ids, mask: Ids, keep: int) -> Array:
        _check_logits(self._runner.capabilities.all_logits, ids, keep)
        check_call(ids, mask, self.length, vocab_size=self._runner.config.vocab_size)
        pads = int((mask == 0).sum(1).max())
        answers = []
        for start, end in _calls(ids.shape[1], keep, pads + 1 - self.length):
            seen = mask[:, : self.length + end - start]
            answers.append(_step(self._runner, ids[:, start:end], seen, self._states))
            self._states = answers[-1][1]
            self.length = seen.shape[1]
        return _last([logits for logits, _ in answers], keep)

    def reorder(self, rows: Sequence[int]) -> None:
        raise H1ExportError("reorder", "rows of one batch cannot change places", "open a movable batch")


class RowByRow:
    """Every row alone and without its pads: for Runners of one row, and for rows that change places.

    ``Runner.step`` leaves its states usable, so rows share states for as long as they are equal, and are computed once.
    """

    def __init__(self, runner: Runner[Any], rows: int) -> None:
        self._runner = runner
        self.length = 0
        self._rows: list[tuple[int, Any]] = [(0, runner.initial(1))] * rows  # tokens so far without pads, states

    def append(self, ids: Ids, mask: Ids, keep: int) -> Array:
        _check_logits(self._runner.capabilities.all_logits, ids, keep)
        check_call(ids, mask, self.length, vocab_size=self._runner.config.vocab_size)
        if len(ids) != len(self._rows) or not mask[:, -1].all():
            raise H1ExportError(
                "attention_mask", "a row has no tokens, or the batch has other rows", "give each row at least one token"
            )
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
        """Logits [at most keep, vocab] of ids [1, new], and the row after them."""
        (past, states) = row
        answers = []
        for start, end in _calls(ids.shape[1], keep):
            logits, states = _step(self._runner, ids[:, start:end], np.ones((1, past + end), np.int64), states)
            answers.append(logits)
        return _last(answers, keep)[0], (past + ids.shape[1], states)

    def reorder(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]


def _check_logits(all_logits: bool, ids: Ids, keep: int) -> None:
    if not all_logits and min(keep, ids.shape[-1]) > 1:
        what = f"logits of {keep} positions, and the artifact gives those of the last one only"
        raise H1ExportError("logits", what, "ask for the last one, or build with --logits all")


def _calls(new: int, keep: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """(start, end) of the calls for ``new`` tokens, the first one of at least ``first``: one, unless most logits are not wanted."""
    start = 0
    while start < new:
        end = min(new, max(start + PREFILL_CHUNK, first)) if keep < new else new
        yield start, end
        start = end


def _step(runner: Runner[Any], ids: Ids, mask: Ids, states: Any) -> tuple[Array, Any]:
    return runner.step(np.ascontiguousarray(ids), np.ascontiguousarray(mask), states)


def _last(answers: Sequence[Array], keep: int) -> Array:
    """The last ``keep`` positions of all of them."""
    wanted: list[Array] = []
    for answer in reversed(answers):
        if (missing := keep - sum(part.shape[1] for part in wanted)) > 0:
            wanted.insert(0, answer[:, -missing:])
    return np.concatenate(wanted, axis=1)
