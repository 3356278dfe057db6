"""Sessions over a small Runner with a known recurrence: every one of them computes what Runner.step computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from h1export.errors import H1ExportError
from h1export.runtime.generation import PREFILL_CHUNK
from h1export.runtime.runner import Limits, Observable, TracksMagnitudes, check_call
from h1export.runtime.session import InPlaceSession, RowByRowSession, SteppedSession, open_session

VOCABULARY = 11
PRIME = 9973


@dataclass
class Config:
    """The part of a model's config that sessions read."""

    vocab_size: int = VOCABULARY


@dataclass(frozen=True)
class States:
    """The number of tokens so far, and a sum for each row that depends on the order of its real tokens."""

    length: int
    sums: Any


@dataclass
class Recurrent:
    """A Runner whose sum after a token is (3 * sum + token) mod PRIME, which is also the least of the logits there."""

    limits: Limits = field(default_factory=Limits)
    config: Config = field(default_factory=Config)
    calls: list[int] = field(default_factory=list)

    def initial(self, batch: int) -> States:
        return States(0, np.zeros(batch, np.int64))

    def step(self, ids: Any, mask: Any, states: States) -> tuple[Any, States]:
        check_call(ids, mask, states.length, vocab_size=VOCABULARY)
        self.calls.append(ids.shape[1])
        sums = states.sums
        logits = []
        for column in range(ids.shape[1]):
            after = (3 * sums + ids[:, column]) % PRIME
            sums = np.where(mask[:, states.length + column] == 1, after, sums)
            logits.append(sums[:, None] + np.arange(VOCABULARY))
        found = np.stack(logits, axis=1).astype(np.float32)
        return found if self.limits.all_logits else found[:, -1:], States(states.length + ids.shape[1], sums)

    def length(self, states: States) -> int:
        return states.length

    def start(self, batch: int, capacity: int) -> SteppedSession:
        return SteppedSession(self, batch)  # type: ignore[arg-type]


def random_ids(rows: int, tokens: int) -> Any:
    return np.random.default_rng(tokens).integers(0, VOCABULARY, (rows, tokens))


def sums_of(row: Any) -> list[int]:
    """The sums after each token, by the formula."""
    found = [0]
    for token in row:
        found.append((3 * found[-1] + int(token)) % PRIME)
    return found[1:]


@pytest.mark.parametrize(
    ("limits", "how", "kind"),
    [
        (Limits(), {}, InPlaceSession),
        (Limits(), {"padded": True}, SteppedSession),
        (Limits(), {"movable": True}, RowByRowSession),
        (Limits(max_batch=1), {}, RowByRowSession),
        (Limits(max_batch=2), {}, InPlaceSession),
        (Limits(max_batch=2), {"padded": True}, RowByRowSession),
    ],
)
def test_the_fastest_session_that_does_what_is_asked(limits: Limits, how: dict[str, bool], kind: type) -> None:
    runner: Any = Recurrent(limits)
    session = open_session(runner, 2, 40, **how)
    assert type(session) is kind
    ids = random_ids(2, 6)
    first = session.append(ids[:, :4])
    second = session.append(ids[:, 4:], keep=1)
    assert session.length == 6
    for row in range(2):
        truth = sums_of(ids[row])
        assert first[row, :, 0].tolist() == truth[:4]
        assert second[row, :, 0].tolist() == truth[-1:]


@pytest.mark.parametrize("kind", [SteppedSession, RowByRowSession])
def test_pads_change_nothing(kind: type[SteppedSession | RowByRowSession]) -> None:
    """A prompt longer than a call, one row with more pads than a call has tokens; then one more token."""
    runner: Any = Recurrent()
    tokens = 2 * PREFILL_CHUNK + 7
    pad = PREFILL_CHUNK + 100
    ids = random_ids(2, tokens + 1)
    mask = np.ones_like(ids)
    mask[1, :pad] = 0
    session = kind(runner, 2)
    prompt = session.append(ids[:, :tokens], mask[:, :tokens], 3)
    token = session.append(ids[:, tokens:], mask)
    assert session.length == tokens + 1
    assert max(runner.calls) < tokens  # logits that are not wanted need no memory
    for row, truth in enumerate((sums_of(ids[0]), sums_of(ids[1, pad:]))):
        assert prompt[row, :, 0].tolist() == truth[-4:-1]
        assert token[row, :, 0].tolist() == truth[-1:]


def test_rows_change_places_and_are_computed_once_while_they_are_equal() -> None:
    runner: Any = Recurrent()
    session = RowByRowSession(runner, 3)
    session.append(np.array([[1, 2]] * 3))
    assert runner.calls == [2]
    session.append(np.array([[3], [4], [5]]))
    session.reorder([2, 2, 0])
    found = session.append(np.array([[6], [6], [7]]))
    assert found[:, 0, 0].tolist() == [sums_of(row)[-1] for row in ([1, 2, 5, 6], [1, 2, 5, 6], [1, 2, 3, 7])]
    assert runner.calls == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", [SteppedSession, RowByRowSession])
def test_a_runner_of_last_logits(kind: type[SteppedSession | RowByRowSession]) -> None:
    runner: Any = Recurrent(Limits(all_logits=False))
    session = kind(runner, 2)
    ids = random_ids(2, 5)
    assert session.append(ids)[:, :, 0].tolist() == [[sums_of(row)[-1]] for row in ids]
    with pytest.raises(H1ExportError, match="ask for the last one, or build with --logits all"):
        session.append(ids, keep=2)
    assert session.length == 5


def test_what_a_session_refuses_changes_nothing() -> None:
    runner: Any = Recurrent()
    ids = random_ids(2, 3)
    padded = np.array([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(H1ExportError, match="pads that the session was not opened for; say so when it is opened"):
        InPlaceSession(runner, 2, 9).append(ids, padded)
    for session in (SteppedSession(runner, 2), RowByRowSession(runner, 2), InPlaceSession(runner, 2, 9)):
        for wrong in (ids[:, :0], ids + VOCABULARY, ids[:1]):
            with pytest.raises(H1ExportError):
                session.append(wrong)
        assert session.length == 0
        assert session.append(ids)[:, -1, 0].tolist() == [sums_of(row)[-1] for row in ids]
    with pytest.raises(H1ExportError, match="give each row at least one token"):
        RowByRowSession(runner, 2).append(ids, np.array([[0, 0, 0], [1, 1, 1]]))


def test_what_a_runner_offers_is_what_it_has_methods_for() -> None:
    class Watched(Recurrent):
        notes = ()
        provenance = None

        def snapshot(self, states: States) -> dict[str, Any]:
            return {}

        def observe(self, ids: Any, mask: Any, states: States) -> Any: ...

        def magnitudes(self) -> dict[str, float]:
            return {}

    assert not isinstance(Recurrent(), Observable | TracksMagnitudes)
    assert isinstance(Watched(), Observable)
    assert isinstance(Watched(), TracksMagnitudes)
