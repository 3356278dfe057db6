"""Who is measured: a Player in a process of its own, so that its memory is its own, answering one timing at a time."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from h1export.core.protocols import Runner, Sequences
from h1export.errors import H1ExportError

CHUNK = 512  # tokens a call while a sequence is brought to its depth


class Kind(StrEnum):
    """What is timed: a prompt of some tokens, or tokens one by one after some."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Timing:
    """One thing to time: prefill of ``tokens``, or decode at depth ``tokens``."""

    kind: Kind
    tokens: int


class Player(Protocol):
    """A model that can be timed."""

    kernels: str  # whose kernels compute

    def speed(self, timing: Timing) -> float:
        """Tokens per second, those of all sequences of a batch together."""
        ...


class RunnerPlayer:
    """A Runner under the clock. Tokens are random: time does not depend on them.

    A sequence stays at about its depth, as later timings go on where earlier ones stopped. At depth 0 each timing starts anew.
    """

    def __init__(self, runner: Runner[Any], batch: int, steps: int, rounds: int) -> None:
        self._runner, self._batch, self._steps, self._rounds = runner, batch, steps, rounds
        self._sequences: dict[int, Sequences] = {}
        self._random = np.random.default_rng(0)
        self.kernels = runner.capabilities.kernels

    def speed(self, timing: Timing) -> float:
        if timing.kind is Kind.PREFILL:
            return self._timed(self._runner.start(self._batch, timing.tokens), [timing.tokens])
        if timing.tokens not in self._sequences:
            capacity = timing.tokens + self._steps * (self._rounds if timing.tokens else 1)
            self._sequences[timing.tokens] = sequences = self._runner.start(self._batch, capacity)
            for start in range(0, timing.tokens, CHUNK):
                self._append(sequences, min(CHUNK, timing.tokens - start))
        if timing.tokens:
            return self._timed(self._sequences[timing.tokens], [1] * self._steps)
        return self._timed(self._sequences.pop(0), [1] * self._steps)

    def _timed(self, sequences: Sequences, calls: list[int]) -> float:
        start = time.perf_counter()
        for tokens in calls:
            self._append(sequences, tokens)
        return self._batch * sum(calls) / (time.perf_counter() - start)

    def _append(self, sequences: Sequences, tokens: int) -> None:
        sequences.append(self._random.integers(0, self._runner.spec.vocab_size, (self._batch, tokens), dtype=np.int64))


class Child:
    """A Player in a process of its own, started afresh. ``make`` runs there, and must be picklable.

    Raises:
        H1ExportError: whatever the Player raises, or the end of its process.
    """

    def __init__(self, make: Callable[[], Player]) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.kernels = str(self._receive())

    def speed(self, timing: Timing) -> float:
        self._pipe.send(timing)
        return float(self._receive())

    def finish(self) -> int:
        """End the process; bytes of memory at its peak beyond what it held before ``make``: interpreter and libraries."""
        self._pipe.send(None)
        peak = int(self._receive())
        self._process.join()
        return peak

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            what = f"its process ended with code {self._process.exitcode}"
            raise H1ExportError("benchmark", what, "a negative code is a signal, -9 often a lack of memory") from None
        if isinstance(answer, _Failure):
            raise H1ExportError(answer.where, answer.what, answer.next_step)
        return answer


@dataclass(frozen=True)
class _Failure:
    where: str
    what: str
    next_step: str


def _serve(make: Callable[[], Player], pipe: Connection) -> None:
    """The child's side: one answer for every request, the last of which is None."""
    before = memory()[0]
    try:
        player = make()
        pipe.send(player.kernels)
        while (timing := pipe.recv()) is not None:
            pipe.send(player.speed(timing))
        pipe.send(memory()[1] - before)
    except (EOFError, KeyboardInterrupt):
        return  # the parent has gone, or goes too
    except H1ExportError as error:
        pipe.send(_Failure(error.where, error.what, error.next_step))
    except Exception as error:  # of any runtime; the parent says it, for the child has no terminal of its own
        pipe.send(_Failure("benchmark", f"{type(error).__name__}: {error}", "report it with the artifact's manifest"))


def memory() -> tuple[int, int]:
    """(now, peak) resident bytes of this process. Where there is no /proc, both are the peak."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak counts the parent's memory too, before exec
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
