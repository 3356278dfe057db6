"""Who is measured: a Player in a process of its own, so that its memory is its own, answering one timing at a time."""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.runtime.runner import Limits, Provenance, Session

CHUNK = 512  # tokens a call while a sequence is brought to its depth
DRIFT = 8  # a sequence is decoded until it is deeper than asked for by this part of the depth


class Kind(StrEnum):
    """What is timed: a prompt of some tokens, or tokens one by one after some."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Timing:
    """One thing to time: prefill of ``tokens``, or decode at depth ``tokens``, for ``batch`` sequences at a time."""

    kind: Kind
    tokens: int
    batch: int = 1

    def __str__(self) -> str:
        what = f"decode at {self.tokens}" if self.kind is Kind.DECODE else f"prefill {self.tokens}"
        return what if self.batch == 1 else f"{what}, batch {self.batch}"

    def refused(self, limits: Limits, steps: int) -> str:
        """Return why a model of these ``limits`` cannot be timed so, ``steps`` tokens a timing; empty where it can."""
        if limits.max_batch is not None and self.batch > limits.max_batch:
            return f"takes {limits.max_batch} sequences at a time"
        room = self.tokens + (steps if self.kind is Kind.DECODE else 0)
        if limits.max_context is not None and room > limits.max_context:
            return f"has room for {limits.max_context} tokens"
        return ""


class TimedModel(Protocol):
    """A model that can be timed."""

    @property
    def limits(self) -> Limits: ...

    @property
    def provenance(self) -> Provenance: ...

    def speed(self, timing: Timing) -> float:
        """Tokens per second, those of all sequences of a batch together."""
        ...


class Timed(Protocol):
    """What a Player needs of a model: a Runner has it, and so has validate's Reference."""

    @property
    def config(self) -> FalconH1Config: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def provenance(self) -> Provenance: ...

    def start(self, batch: int, capacity: int) -> Session: ...


class RunnerModel:
    """A model under the clock. Tokens are random: time does not depend on them.

    Later timings of a depth go on where earlier ones stopped, until the sequence is deeper by a part of 1 / DRIFT or one timing; then
    a new one is brought to the depth. At depth 0 each timing starts anew. ``chunk``: tokens a call on the way to a depth.
    """

    def __init__(
        self, model: Timed, steps: int, clock: Callable[[], float] = time.perf_counter, chunk: int = CHUNK
    ) -> None:
        self._model = model
        self._steps = steps
        self._clock = clock
        self._chunk = chunk
        self._sequences: dict[Timing, tuple[Session, int]] = {}  # and their capacity
        self._random = np.random.default_rng(0)

    @property
    def limits(self) -> Limits:
        return self._model.limits

    @property
    def provenance(self) -> Provenance:
        return self._model.provenance

    def speed(self, timing: Timing) -> float:
        if timing.kind is Kind.PREFILL:
            return self._timed(self._model.start(timing.batch, timing.tokens), timing, [timing.tokens])
        sequences, capacity = self._sequences.pop(timing, (None, 0))
        if sequences is None or sequences.length + self._steps > capacity:
            capacity = timing.tokens + max(self._steps, timing.tokens // DRIFT)
            capacity = min(capacity, self._model.limits.max_context or capacity)
            sequences = self._model.start(timing.batch, capacity)
            for start in range(0, timing.tokens, self._chunk):
                self._append(sequences, timing, min(self._chunk, timing.tokens - start))
        self._sequences[timing] = sequences, capacity
        return self._timed(sequences, timing, [1] * self._steps)

    def _timed(self, sequences: Session, timing: Timing, calls: list[int]) -> float:
        start = self._clock()
        for tokens in calls:
            self._append(sequences, timing, tokens)
        return timing.batch * sum(calls) / (self._clock() - start)

    def _append(self, sequences: Session, timing: Timing, tokens: int) -> None:
        sequences.append(
            self._random.integers(0, self._model.config.vocab_size, (timing.batch, tokens), dtype=np.int64)
        )


def pin(threads: int) -> tuple[int, ...]:
    """Keep this process on as many cores as it has threads, so that they do not wander; which, or none outside Linux.

    The last ones: systems like to put their own work on the first.
    """
    if sys.platform != "linux":
        return ()
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    os.sched_setaffinity(0, cores)
    return tuple(cores)


class WorkerProcess:
    """A Player in a process of its own, started afresh. ``make`` runs there, and must be picklable.

    Raises:
        H1ExportError: whatever the Player raises, or the end of its process.
    """

    def __init__(self, make: Callable[[], TimedModel]) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.limits: Limits = self._receive()
        self.provenance: Provenance = self._receive()

    @property
    def kernels(self) -> str:
        return self.provenance.kernels

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


def _serve(make: Callable[[], TimedModel], pipe: Connection) -> None:
    """The child's side: one answer for every request, the last of which is None."""
    before = memory()[0]
    warnings.simplefilter("ignore")  # libraries' warnings are for developers
    try:
        player = make()
        pipe.send(player.limits)
        pipe.send(player.provenance)
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
