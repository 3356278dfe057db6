"""Scheduler over a model that is known: turns, errors, cancellations and the queue, without a runtime."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import numpy as np
import pytest

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.runtime.generation import PREFILL_CHUNK, Sampler, Sampling
from h1export.runtime.prefix_store import PrefixStore
from h1export.runtime.rows import SeparateRows
from h1export.runtime.runner import Limits
from h1export.runtime.saved_states import SavedStates
from h1export.serve.choice import Choice, Ended, Failed, Piece, Started
from h1export.serve.problems import ProblemError
from h1export.serve.scheduler import Scheduler, Task

VOCABULARY = 50


@dataclass(eq=False)
class Counting:
    """A session whose logits prefer the sum of its tokens, modulo VOCABULARY."""

    config: FalconH1Config
    log: list[int]
    kept: list[int | None]
    length: int = 0
    sum: int = 0

    def append(self, ids: Any, *, keep: int | None = None) -> Any:
        if 13 in ids:
            raise ValueError("an unlucky token")
        if ids.shape[1] > 1:
            self.log.append(ids.shape[1])
            self.kept.append(keep)
        sums = self.sum + np.cumsum(ids[0])
        self.sum = int(sums[-1])
        self.length += ids.shape[1]
        logits = np.zeros((1, len(sums), VOCABULARY), np.float32)
        logits[0, np.arange(len(sums)), sums % VOCABULARY] = 5
        return logits if keep is None else logits[:, -keep:]

    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        spec = StateSpec.of(self.config)
        arrays = {tensor.key: np.full(tensor.sized(1, self.length), self.sum, np.float32) for tensor in spec.tensors}
        return SavedStates.of(spec, arrays, 0, start=start, length=self.length)

    def restore(self, saved: SavedStates) -> None:
        self.length = saved.length
        self.sum = int(saved.arrays["0.recurrent_state"].flat[0])


@dataclass
class Runner:
    config: FalconH1Config
    log: list[int]
    kept: list[int | None] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)

    def start(self, batch: int, capacity: int) -> Counting:
        return Counting(self.config, self.log, self.kept)


class Letters:
    """A decoder that gives each token a letter."""

    def step(self, token: int) -> str:
        return chr(ord("0") + token)

    def rest(self) -> str:
        return ""


class Silent:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def began(self, *_: Any, **__: Any) -> None: ...

    def token(self, seconds: float) -> None: ...

    def failed(self, error: BaseException) -> None:
        self.errors.append(type(error).__name__)


@dataclass
class Rounds(SeparateRows):
    """What is computed, call by call, and when: a token of the texts waits until it is let go on.

    Attributes:
        log: The tokens of each prompt's call, and for each token of the texts the number of texts, negative.
        places: The rows that have not left.
        error: What the calls of the texts raise.
    """

    log: list[int] = field(default_factory=list)
    steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    places: list[Any] = field(default_factory=list)
    error: Exception | None = None

    def join(self, session: Any) -> Any:
        self.places.append(super().join(session))
        return self.places[-1]

    def append(self, tokens: Any) -> Any:
        self.steps.acquire()
        self.log.append(-len(tokens))
        if self.error is not None:
            raise self.error
        assert all(row in self.places for row in tokens)
        return super().append(tokens)

    def leave(self, row: Any) -> None:
        self.places.remove(row)

    def go(self, times: int = 1000) -> None:
        self.steps.release(times)


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


@pytest.fixture
def scheduler(config_of: Callable[..., FalconH1Config], rounds: Rounds) -> Iterator[Scheduler]:
    config = config_of(num_hidden_layers=1, max_position_embeddings=2000)
    store = PrefixStore(StateSpec.of(config), 64 << 20)
    runner: Any = Runner(config, rounds.log)
    made = Scheduler(runner, store, rows=4, queue=2, watch=Silent(), together=rounds)
    yield made
    rounds.go()
    made.close()


def task(ids: Sequence[int], tokens: int, n: int = 1, **sampling: Any) -> tuple[Task, Queue[Any]]:
    events: Queue[Any] = Queue()
    decoder: Any = Letters()
    choices = [
        Choice(
            index,
            Sampler(Sampling(seed=index, **sampling)),
            decoder,
            end=frozenset({0}),
            most=tokens,
            emit=events.put,
        )
        for index in range(n)
    ]
    return Task(ids, choices), events


def texts(events: Queue[Any], n: int = 1) -> list[str]:
    """The texts of the choices, or the error."""
    said = [""] * n
    left = n
    while left:
        event = events.get(timeout=20)
        if isinstance(event, Failed):
            return [f"{type(event.error).__name__}: {event.error}"]
        if isinstance(event, Piece | Ended):
            said[event.index] += event.text
            left -= isinstance(event, Ended)
    return said


def expected(ids: Sequence[int], tokens: int) -> str:
    """The greedy text: each token is the sum of all before it."""
    total, said = sum(ids), ""
    for _ in range(tokens):
        token = total % VOCABULARY
        if token == 0:
            break
        said += chr(ord("0") + token)
        total += token
    return said


def settled(scheduler: Scheduler, rounds: Rounds) -> bool:
    """Whether nothing is computed soon, and every row has left."""
    end = time.monotonic() + 20
    while (scheduler.running or scheduler.waiting) and time.monotonic() < end:
        time.sleep(0.01)
    return not (scheduler.running or scheduler.waiting or rounds.places)


def test_a_long_prompt_does_not_hold_up_texts(scheduler: Scheduler, rounds: Rounds) -> None:
    """While two prompts are computed by turns, every text gets a token in every round."""
    text, said = task([1, 2], 40)
    scheduler.submit([text])
    rounds.go(3)
    while not isinstance(said.get(timeout=20), Piece):
        pass
    long, other = task([1] * 5 * PREFILL_CHUNK, 3), task([2] * 3 * PREFILL_CHUNK, 3)
    scheduler.submit([long[0], other[0]])
    rounds.go()
    assert texts(said)[0].endswith(expected([1, 2], 40)[-5:])
    assert texts(long[1]) == [expected(long[0].ids, 3)]
    assert texts(other[1]) == [expected(other[0].ids, 3)]
    chunks = [place for place, size in enumerate(rounds.log) if size == PREFILL_CHUNK]
    assert len(chunks) == 8
    assert 1 not in np.diff(chunks)  # a call for the texts lies between any two
    assert -sum(size for size in rounds.log if size < 0) == 39 + 2 + 2
    assert min(rounds.log[: chunks[-1]]) < -1  # the shorter prompt is done before the longer one, which came first


def test_requests_join_and_leave_between_tokens(scheduler: Scheduler, rounds: Rounds) -> None:
    rounds.go()
    tasks = [task([1, 3 + number], 5 + number) for number in range(6)]
    for one, _ in tasks[:4]:
        scheduler.submit([one])
    found = [texts(events) for _, events in tasks[:4]]
    for one, _ in tasks[4:]:
        scheduler.submit([one])
    found += [texts(events) for _, events in tasks[4:]]
    assert found == [[expected(one.ids, 5 + number)] for number, (one, _) in enumerate(tasks)]
    assert settled(scheduler, rounds)


def test_choices_share_a_prompt_and_go_their_own_ways(scheduler: Scheduler, rounds: Rounds) -> None:
    rounds.go(10000)
    ids = [3] * 200
    together, events = task(ids, 8, 4, temperature=3.0)
    scheduler.submit([together])
    found = texts(events, 4)
    assert sum(size for size in rounds.log if size > 0) == len(ids)
    alone = []
    for index in range(4):
        one, said = task(ids, 8, temperature=3.0)
        one.choices[0]._sampler = Sampler(Sampling(temperature=3.0, seed=index))
        scheduler.submit([one])
        alone += texts(said)
    assert found == alone
    assert len(set(found)) == 4


def test_an_error_is_its_own_request_s(scheduler: Scheduler, rounds: Rounds) -> None:
    """In a prompt, in a text, in a choice's own steps, and where a prompt is none."""
    good, said = task([1, 1], 30)
    bad = [task([1, 13], 3), task([6, 6], 3), task([], 3), task([1] * 2000, 3)]
    bad[1][0].choices[0]._sampler = None  # type: ignore[assignment]
    scheduler.submit([good])
    for one, _ in bad[:3]:
        scheduler.submit([one])
    rounds.go()
    lines = [texts(events)[0] for _, events in bad[:3]]
    scheduler.submit([bad[3][0]])
    lines += texts(bad[3][1])
    assert [line.partition(":")[0] for line in lines] == [
        "ValueError",
        "AttributeError",
        "H1ExportError",
        "H1ExportError",
    ]
    assert texts(said) == [expected([1, 1], 30)]
    assert settled(scheduler, rounds)


def test_a_call_that_fails_ends_the_texts_in_it(scheduler: Scheduler, rounds: Rounds) -> None:
    rounds.go()
    first, second = task([1, 1], 30), task([2, 2], 30, 2)
    rounds.error = MemoryError("no room")
    scheduler.submit([first[0], second[0]])
    assert texts(first[1]) == texts(second[1], 2) == ["MemoryError: no room"]
    rounds.error = None
    later, said = task([5, 5], 3)
    scheduler.submit([later])
    assert texts(said) == [expected([5, 5], 3)]
    assert settled(scheduler, rounds)


def test_a_cancelled_request_frees_its_rows_at_the_next_round(scheduler: Scheduler, rounds: Rounds) -> None:
    first, said = task([1, 2], 1000, 4)
    waiting, later = task([5, 5], 3)
    gone, never = task([5, 5], 3)
    for one in (first, gone, waiting):
        scheduler.submit([one])
    rounds.go(2)
    while not isinstance(said.get(timeout=20), Started):
        pass
    assert scheduler.waiting == 2
    first.is_cancelled = gone.is_cancelled = True
    rounds.go()
    assert texts(later) == [expected([5, 5], 3)]
    assert never.empty()
    assert settled(scheduler, rounds)


def test_scores_of_a_prompt_are_all_that_needs_every_position(config_of: Callable[..., FalconH1Config]) -> None:
    runner: Any = Runner(config_of(num_hidden_layers=1), [])
    scheduler = Scheduler(runner, None, rows=1, queue=2, watch=Silent(), together=SeparateRows())
    ids = [1, 2, 5, 4] * (PREFILL_CHUNK // 2)
    plain, scored = task(ids, 1), task(ids, 1)
    scored[0].top = 1
    for one, events in (plain, scored):
        scheduler.submit([one])
        started = events.get(timeout=20)
        assert isinstance(started, Started)
        likeliest = [score.top[0][0] for score in started.scored[1:]]
        assert likeliest == ([] if one.top is None else (np.cumsum(ids)[:-1] % VOCABULARY).tolist())
        assert texts(events) == [expected(ids, 1)]
    assert runner.kept == [1, 1, None, None]
    scheduler.close()


def test_the_queue_has_an_end(scheduler: Scheduler, rounds: Rounds) -> None:
    tasks = [task([1, number], 4, 4) for number in range(1, 4)]
    for place, (one, events) in enumerate(tasks):
        scheduler.submit([one])
        if place == 0:
            rounds.go(1)
            while not isinstance(events.get(timeout=20), Started):
                pass
    with pytest.raises(ProblemError, match="too many requests wait; try again in 1 s") as caught:
        scheduler.submit([task([1, 1], 4)[0]])
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    with pytest.raises(ProblemError, match="n is 4 at most"):
        scheduler.submit([task([1, 1], 4, 5)[0]])
    rounds.go()
    assert texts(tasks[2][1], 4) == [expected([1, 3], 4)] * 4


def test_closing_ends_what_is_left(config_of: Callable[..., FalconH1Config]) -> None:
    rounds = Rounds()
    runner: Any = Runner(config_of(num_hidden_layers=1), rounds.log)
    scheduler = Scheduler(runner, None, rows=1, queue=5, watch=Silent(), together=rounds)
    tasks = [task([1, 2], 1000) for _ in range(3)]
    for one, _ in tasks:
        scheduler.submit([one])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    rounds.go(3)
    closing.join(20)
    assert [texts(events) for _, events in tasks] == [["ProblemError: the server is stopping"]] * 3
    assert not rounds.places
    with pytest.raises(ProblemError, match="the server is stopping"):
        scheduler.submit([task([1], 1)[0]])
