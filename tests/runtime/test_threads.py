"""Threads over a small Runner: sessions, sequences and iterators take one call, and a call that may not run raises."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from threaded_runners import in_fork

from h1export.errors import H1ExportError
from h1export.runtime.continued import ContinuedSequence
from h1export.runtime.generation import Sampling, generate
from h1export.runtime.runner import Limits, check_call
from h1export.runtime.session import InPlaceSession, RowByRowSession, SteppedSession, open_session
from h1export.runtime.sharing import Home, OneCall, OneReader, one_call

VOCABULARY = 64
PRIME = 9973
ONES = np.array([[1]])
BUSY = "is in use by another call"


class Slow:
    """A Runner whose steps can be held open; its logits tell the order of all tokens so far."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.config: Any = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=1000)
        self.inside = Event()
        self.go = Event()
        self.go.set()

    def initial(self, batch: int) -> tuple[int, Any]:
        return 0, np.zeros(batch, np.int64)

    def length(self, states: tuple[int, Any]) -> int:
        return states[0]

    def step(self, ids: Any, mask: Any, states: tuple[int, Any]) -> tuple[Any, Any]:
        check_call(ids, mask, states[0], vocab_size=VOCABULARY)
        sums = states[1]
        found = []
        for column in range(ids.shape[1]):
            sums = (3 * sums + ids[:, column] + 1) % PRIME
            found.append((sums[:, None] * np.arange(1, VOCABULARY + 1)) % 101)
            time.sleep(0)  # lets another thread run here
        self.inside.set()
        assert self.go.wait(30)
        return np.stack(found, axis=1).astype(np.float32), (states[0] + ids.shape[1], sums)

    def start(self, batch: int, capacity: int) -> SteppedSession:
        return SteppedSession(self, batch)  # type: ignore[arg-type]


def held(runner: Slow, call: Callable[[], Any], others: dict[str, Callable[[], Any]]) -> Any:
    """Try ``others`` while ``call`` is inside the Runner; return what it gives."""
    runner.inside.clear()
    runner.go.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        assert runner.inside.wait(30)
        try:
            for other in others.values():
                with pytest.raises(H1ExportError, match=BUSY):
                    other()
        finally:
            runner.go.set()
        return running.result(30)


@pytest.mark.parametrize(
    ("how", "kind"),
    [({}, InPlaceSession), ({"padded": True}, SteppedSession), ({"movable": True}, RowByRowSession)],
    ids=["in_place", "stepped", "row_by_row"],
)
def test_a_session_takes_one_call(how: dict[str, Any], kind: type[Any]) -> None:
    runner = Slow()
    session: Any = open_session(runner, 2, 20, **how)
    alone: Any = open_session(runner, 2, 20, **how)
    assert type(session) is kind
    ids = np.array([[3, 1, 4], [1, 5, 9]])
    others = {
        "append": lambda: session.append(ids),
        "save": lambda: session.save(),
        "restore": lambda: session.restore(None),
    }
    if kind is RowByRowSession:
        others["reorder"] = lambda: session.reorder([1, 0])
    found = held(runner, lambda: session.append(ids), others)
    assert np.array_equal(found, alone.append(ids))
    assert session.length == 3
    assert np.array_equal(session.append(ids), alone.append(ids))  # the refused calls have changed nothing


def test_threads_that_take_turns_may_share_a_session() -> None:
    session, alone = (open_session(Slow(), 1, 20) for _ in range(2))  # type: ignore[arg-type]
    for token in range(6):
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(session.append, np.array([[token]])).result()
        assert np.array_equal(found, alone.append(np.array([[token]])))


def test_a_call_that_fails_leaves_the_session_free() -> None:
    session = open_session(Slow(), 1, 20)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(H1ExportError, match="token ids"):
            session.append(np.array([[VOCABULARY]]))
    assert session.append(ONES).shape == (1, 1, VOCABULARY)


@pytest.mark.parametrize("threads", [2, 8])
def test_many_generations_of_one_runner(threads: int) -> None:
    """Read by threads at once, and by one thread in turns, each is what it is alone."""
    runner = Slow()

    def tokens(seed: int) -> Any:
        prompt = np.arange(seed + 1) % VOCABULARY
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(runner, prompt, 20, sampling=sampling, eos=frozenset())  # type: ignore[arg-type]

    truth = [list(tokens(seed)) for seed in range(threads)]
    assert truth[0] != truth[1]
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(lambda seed: list(tokens(seed)), range(threads))) == truth
    assert [list(turn) for turn in zip(*zip(*map(tokens, range(threads)), strict=True), strict=True)] == truth


def test_a_generation_has_one_reader() -> None:
    runner = Slow()
    tokens: Any = generate(runner, np.array([5]), 3, sampling=Sampling(), eos=frozenset())  # type: ignore[arg-type]
    first = held(runner, lambda: next(tokens), {"next": lambda: next(tokens), "close": tokens.close})
    assert isinstance(first, int)
    assert len(list(tokens)) == 2
    tokens.close()


def test_a_sequence_takes_one_call(config_of: Callable[..., Any]) -> None:
    runner = Slow()
    runner.config = config_of(vocab_size=VOCABULARY)
    sequence = ContinuedSequence(runner)  # type: ignore[arg-type]
    others = {
        "become": lambda: sequence.become([2]),
        "append": lambda: sequence.append(2),
        "save": lambda: sequence.save(),
    }
    found = held(runner, lambda: sequence.become([1, 2, 3]), others)
    assert sequence.ids == [1, 2, 3]
    assert np.array_equal(found, ContinuedSequence(runner).become([1, 2, 3]))  # type: ignore[arg-type]
    with pytest.raises(H1ExportError, match=f"sequence: {BUSY}"):  # what ``stop`` calls is another call
        sequence.become([1, 2, 3, 4], stop=lambda: sequence.append(7) is None)
    assert sequence.ids == [1, 2, 3]


def test_no_call_gets_in_by_chance() -> None:
    """Of many threads that all want in, one at a time is: the others are refused, and none waits."""

    class Counter:
        def __init__(self) -> None:
            self._one_call = OneCall("counter")
            self.inside = self.most = self.done = 0

        @one_call
        def work(self) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)
            self.inside -= 1
            self.done += 1

    counter = Counter()

    def tries(_: int) -> int:
        refused = 0
        for _ in range(20):
            try:
                counter.work()
            except H1ExportError:
                refused += 1
        return refused

    with ThreadPoolExecutor(8) as pool:
        refused = sum(pool.map(tries, range(8)))
    assert counter.most == 1
    assert counter.done == 160 - refused
    assert refused > 0


def test_a_fork_is_refused() -> None:
    """Also where a thread that the fork does not have was inside."""
    guard = OneCall("session")
    reader = OneReader(iter([1, 2]), "generation")
    home = Home("folder")
    assert next(reader) == 1
    guard.__enter__()

    def work() -> None:
        assert not home.is_here
        for call in (home.check, guard.__enter__, lambda: next(reader), reader.close):
            with pytest.raises(H1ExportError, match=r"was made in process \d+, and this one is a fork of it; load"):
                call()

    in_fork(work)
    home.check()
    assert next(reader) == 2


def test_without_the_guard_these_checks_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneCall, "__enter__", lambda self: None)
    monkeypatch.setattr(OneCall, "__exit__", lambda self, *_: None)
    session: Any = SteppedSession(runner := Slow(), 1)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        held(runner, lambda: session.append(ONES), {"save": lambda: session.save()})
