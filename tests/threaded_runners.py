"""Checks of any target's Runner: many threads get what one gets, sessions take one call, forks are refused.

And a session that has computed a token needs no file for the next one.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from h1export.errors import H1ExportError
from h1export.runtime.generation import Sampling, generate
from h1export.runtime.runner import Runner

ROOM = 40
SECONDS = 60  # after which a child that hangs is ended


def random_ids(runner: Runner[Any], tokens: int, seed: int) -> Any:
    return np.random.default_rng([tokens, seed]).integers(0, runner.config.vocab_size, (1, tokens))


def by_session(runner: Runner[Any], seed: int) -> list[Any]:
    """A prompt, tokens one by one, states saved and restored, and more tokens: all logits."""
    ids = random_ids(runner, 20, seed)
    session = runner.start(1, ROOM)
    found = [session.append(ids[:, :9])]
    found += [session.append(ids[:, place : place + 1]) for place in range(9, 13)]
    saved = session.save()
    found.append(session.append(ids[:, 13:17]))
    session.restore(saved)
    found.append(session.append(ids[:, 17:]))
    return found


def by_steps(runner: Runner[Any], seed: int) -> list[Any]:
    """Steps of which two begin at the same states."""
    ids = random_ids(runner, 12, seed)
    first, states = runner.step(ids[:, :7], np.ones((1, 7), np.int64), runner.initial(1))
    mask = np.ones((1, 8), np.int64)
    again = [runner.step(ids[:, place : place + 1], mask, states)[0] for place in (7, 8, 7)]
    return [first, *again]


def by_generation(runner: Runner[Any], seed: int) -> list[Any]:
    prompt = random_ids(runner, 5, seed)[0]
    sampling = Sampling(temperature=1.0, seed=seed)
    return [np.array(list(generate(runner, prompt, 8, sampling=sampling, eos=frozenset())))]


def check_threads(runner: Runner[Any], threads: int = 4, ways: tuple[Callable[..., list[Any]], ...] = ()) -> None:
    """Every thread computes sequences of its own, and each gets bit for bit what a single thread gets."""
    ways = ways or (by_session, by_steps, by_generation)
    truth = [[way(runner, seed) for way in ways] for seed in range(threads)]
    barrier = Barrier(threads)

    def work(seed: int) -> list[list[Any]]:
        barrier.wait()
        return [way(runner, seed) for way in ways]

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, range(threads)))
    for seed in range(threads):
        for expected, given in zip(truth[seed], found[seed], strict=True):
            assert all(np.array_equal(one, other) for one, other in zip(expected, given, strict=True))
    assert not np.array_equal(truth[0][0][0], truth[1][0][0])  # the sequences differ


def check_one_call(runner: Runner[Any]) -> None:
    """While a call is inside a session, every other one is refused at once, and changes nothing."""
    ids = random_ids(runner, 9, 0)
    session: Any = runner.start(1, ROOM)
    other = runner.start(1, ROOM)
    for one in (session, other):
        one.append(ids[:, :5])
    saved = session.save()
    calls = (lambda: session.append(ids[:, 5:]), lambda: session.save(), lambda: session.restore(saved))
    with session._one_call, ThreadPoolExecutor(1) as pool:
        for call in calls:
            with pytest.raises(H1ExportError, match="session: is in use by another call"):
                pool.submit(call).result(10)
            with pytest.raises(H1ExportError, match="session: is in use by another call"):
                call()
        expected = other.append(ids[:, 5:])  # another session of the Runner is free
    assert session.length == 5
    assert np.array_equal(session.append(ids[:, 5:]), expected)


def in_fork(work: Callable[[], None]) -> None:
    """Run ``work`` in a forked process, and fail where it fails or does not end."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def check_fork(runner: Runner[Any]) -> None:
    """A forked process is told so by every call that computes; the parent goes on."""
    ids = random_ids(runner, 6, 1)
    mask = np.ones((1, 6), np.int64)
    states = runner.initial(1)
    session = runner.start(1, ROOM)
    before = session.append(ids)

    def work() -> None:
        for call in (
            lambda: session.append(ids),
            lambda: session.save(),
            lambda: runner.step(ids, mask, states),
            lambda: runner.start(1, ROOM),
        ):
            with pytest.raises(H1ExportError, match="this one is a fork of it"):
                call()

    in_fork(work)
    assert np.array_equal(runner.start(1, ROOM).append(ids), before)


@cache
def opened_files() -> list[list[object]]:
    """Lists, each of which gets the name of every file that this process opens from now on; a hook stays for ever."""
    lists: list[list[object]] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            for one in lists:
                one.append(arguments[0])

    sys.addaudithook(hook)
    return lists


@contextmanager
def watched() -> Iterator[list[object]]:
    """What is opened meanwhile."""
    found: list[object] = []
    opened_files().append(found)
    try:
        yield found
    finally:
        opened_files()[:] = [one for one in opened_files() if one is not found]


def check_files(runner: Runner[Any]) -> None:
    """Tokens after the first ones read no file and no folder: what is installed is looked up before."""
    ids = random_ids(runner, 9, 2)
    session = runner.start(1, ROOM)
    states = runner.step(ids[:, :5], np.ones((1, 5), np.int64), runner.initial(1))[1]
    session.append(ids[:, :5])
    session.append(ids[:, 5:6])
    with watched() as files:
        session.append(ids[:, 6:7])
        runner.step(ids[:, 5:6], np.ones((1, 6), np.int64), states)
    assert not files, files[:3]


CHECKS = {"threads": check_threads, "one_call": check_one_call, "fork": check_fork, "files": check_files}
