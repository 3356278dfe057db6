"""Work of a build that writes nothing, done once for all forks of this process: the trace, and GPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def remembered(module: Any, name: str) -> Iterator[None]:
    """Note the calls of a function of ``module``; afterwards such calls return what one call more has returned.

    A build changes the program that was traced, so a process may use a result once: each fork has its own copy.
    """
    function: Callable[..., Any] = getattr(module, name)
    calls: dict[str, tuple[Any, ...]] = {}

    def noting(*given: Any) -> Any:
        calls[repr(given)] = given
        return function(*given)

    setattr(module, name, noting)
    yield
    results = {key: function(*given) for key, given in calls.items()}

    def answering(*given: Any) -> Any:
        key = repr(given)
        return results[key] if key in results else function(*given)

    setattr(module, name, answering)
