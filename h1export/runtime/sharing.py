"""What threads and forked processes may share: a Runner is for any number of threads, a session for one call at a time.

A call that may not run raises at once. It never waits for another one, and never computes with states that another one
is changing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import wraps
from threading import Lock
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from h1export.errors import H1ExportError

P = ParamSpec("P")
R = TypeVar("R")
Item = TypeVar("Item")


class Home:
    """The process that made an object, which a process forked from it cannot use: the runtime's threads are not there.

    Args:
        what: What the object is, for errors.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raise H1ExportError in a process that was forked from it."""
        if not self.is_here:
            what = f"was made in process {self._process}, and this one is a fork of it"
            raise H1ExportError(self.what, what, "load the artifact in this process, or start processes with spawn")


class OneCall:
    """Lets one call at a time into what it guards; ``with`` raises H1ExportError where another call is inside.

    The other call may be another thread's, or one that called back. A forked process is not let in either.

    Args:
        what: What is guarded, for errors.
    """

    def __init__(self, what: str) -> None:
        self._home = Home(what)
        self._lock = Lock()

    def __enter__(self) -> None:
        self._home.check()  # first, because the lock of a fork may be held by a thread that it does not have
        if not self._lock.acquire(blocking=False):
            what = "is in use by another call"
            raise H1ExportError(self._home.what, what, "give every thread one of its own, or let one call end first")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class Guarded(Protocol):
    """An object whose methods take one call at a time."""

    @property
    def _one_call(self) -> OneCall: ...


Self = TypeVar("Self", bound=Guarded)


def one_call(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """Let ``method`` run only while no other such method of the same object does."""

    @wraps(method)
    def guarded(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._one_call:
            return method(self, *args, **kwargs)

    return guarded


class OneReader(Iterator[Item]):
    """The items of a generator, which one caller at a time may ask for.

    Args:
        items: The generator.
        what: What it is, for errors.
    """

    def __init__(self, items: Iterator[Item], what: str) -> None:
        self._items = items
        self._one_call = OneCall(what)

    @one_call
    def __next__(self) -> Item:
        return next(self._items)

    @one_call
    def close(self) -> None:
        """End the generator where it is."""
        if hasattr(self._items, "close"):
            self._items.close()
