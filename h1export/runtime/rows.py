"""Rows: sequences of different lengths that go on together, token by token, and join and leave between tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from h1export.model.falcon_h1.states import Array
from h1export.runtime.runner import RestorableSession, Runner


class Rows(Protocol):
    """Sequences that are being extended; each has the logits that it would have alone.

    It takes one call at a time, like a session.
    """

    def join(self, session: RestorableSession) -> Hashable:
        """Let the sequence of ``session``, which has one row, go on here, and return the row that it is now.

        The caller does not use the session again.
        """
        ...

    def append(self, tokens: Mapping[Hashable, int]) -> dict[Hashable, Array | BaseException]:
        """Extend each of these rows by its token; other rows wait.

        Returns the logits float32 [vocab] after each row's token, or the error of that row, which then has to leave.
        """
        ...

    def leave(self, row: Hashable) -> None:
        """Forget the row."""
        ...


@runtime_checkable
class ComputesRows(Protocol):
    """A Runner that computes rows of different lengths in one call, with the weights read once."""

    def rows(self, most: int) -> Rows | None:
        """Return room for ``most`` rows, or None where a row's logits would depend on the other rows."""
        ...


class SeparateRows:
    """Rows that are sessions, each extended by a call of its own."""

    def join(self, session: RestorableSession) -> Hashable:
        return session

    def append(self, tokens: Mapping[Hashable, int]) -> dict[Hashable, Array | BaseException]:
        answers: dict[Hashable, Array | BaseException] = {}
        for session, token in tokens.items():
            assert hasattr(session, "append")
            try:
                answers[session] = session.append(np.array([[token]], np.int64))[0, -1]
            except Exception as error:  # this row's, and no other's
                answers[session] = error
        return answers

    def leave(self, row: Hashable) -> None:
        """Nothing is kept here."""


def open_rows(runner: Runner[Any], most: int) -> Rows:
    """Return room for ``most`` rows over ``runner``: together where the runtime computes them so, else one by one."""
    together = runner.rows(most) if isinstance(runner, ComputesRows) else None
    return SeparateRows() if together is None else together
