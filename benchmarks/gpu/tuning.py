"""Bound the time that a peer's autotuning takes, which a section of some minutes cannot pay in full.

Triton's autotuner compiles and times every configuration of a kernel at its first call. mamba-ssm's prefill has five
such kernels with up to some dozens each, and took more than 25 seconds for one shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

KERNEL_S = 2.0  # seconds after which the autotuning of one kernel tries no further configuration
UNKNOWN = [math.inf] * 3  # the autotuner's times of a configuration that it cannot run


@dataclass
class Search:
    """One search of an autotuner: since when, and whether a configuration ran."""

    since: float
    ran: bool = False


@dataclass
class Tuned:
    """What the autotuners did: configurations that were timed, and those that the limit left out."""

    timed: int = 0
    left_out: int = 0

    @property
    def note(self) -> str:
        """Say what the limit left out; empty where it left out nothing."""
        every = self.timed + self.left_out
        return f"autotuning timed {self.timed} of {every} configurations" if self.left_out else ""


@contextmanager
def limited(kernel_s: float = KERNEL_S, *, end: float = math.inf) -> Iterator[Tuned]:
    """Let every autotuner of Triton stop its search after ``kernel_s`` seconds, or at time.monotonic() ``end``.

    It takes the fastest configuration it has timed by then, and always times one that runs.
    """
    from triton.runtime.autotuner import Autotuner

    bench = Autotuner._bench
    prune = Autotuner.prune_configs
    searches: dict[int, Search] = {}
    tuned = Tuned()

    def bounded(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        search = searches.get(id(self))
        if search is None:
            search = searches[id(self)] = Search(time.monotonic())
        now = time.monotonic()
        if search.ran and (now > end or now - search.since > kernel_s):
            tuned.left_out += 1
            return UNKNOWN
        tuned.timed += 1
        found = bench(self, *args, config=config, **meta)
        search.ran = search.ran or math.isfinite(found[0] if isinstance(found, list | tuple) else found)
        return found

    def anew(self: Any, *args: Any) -> Any:  # called once for each search: sizes for which there is no choice yet
        searches.pop(id(self), None)
        return prune(self, *args)

    with mock.patch.object(Autotuner, "_bench", bounded), mock.patch.object(Autotuner, "prune_configs", anew):
        yield tuned
