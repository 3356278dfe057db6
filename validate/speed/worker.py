"""Benchmark workers: a model in a process of its own, whose memory can be measured, does one timing at a time."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from h1export import host
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.report.checks import Phase
from h1export.runtime.runner import Limits, Provenance, Session

SAFE_PATH = "PYTHONSAFEPATH"  # of the environment
CHUNK = 512  # tokens a call while a sequence is brought to its depth
GROWTH_DIVISOR = 8  # a session is used again until it is deeper than its nominal depth by depth / GROWTH_DIVISOR


@dataclass(frozen=True)
class Timing:
    """One thing to time: prefill of ``tokens``, or decode at depth ``tokens``, for ``batch`` sequences at a time."""

    phase: Phase
    tokens: int
    batch: int = 1

    @property
    def key(self) -> str:
        """The name of the timing in baselines and messages; ``gate_checks.timing_label`` has that of tables."""
        key = f"decode at {self.tokens}" if self.phase is Phase.DECODE else f"prefill {self.tokens}"
        return key if self.batch == 1 else f"{key}, batch {self.batch}"

    def refused(self, limits: Limits, steps: int) -> str:
        """Return why a model of these ``limits`` cannot do the timing in ``steps`` steps; empty where it can."""
        if limits.max_batch is not None and self.batch > limits.max_batch:
            return f"takes {limits.max_batch} sequences at a time"
        room = self.tokens + (steps if self.phase is Phase.DECODE else 0)
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
        """Return tokens per second, those of all sequences of a batch together."""
        ...


class StartableModel(Protocol):
    """The part of a Runner that RunnerModel needs; validate's Reference has it too."""

    @property
    def config(self) -> FalconH1Config: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def provenance(self) -> Provenance: ...

    def start(self, batch: int, capacity: int) -> Session: ...


class RunnerModel:
    """Times a Runner or a Reference. Tokens are random: time does not depend on them.

    Later timings at a depth continue where earlier ones stopped, until the session is deeper by 1 / GROWTH_DIVISOR of
    the depth or by one timing; then a new session is brought to the depth. At depth 0 each timing starts a new one.

    Args:
        model: the model that is timed.
        steps: the number of tokens that one timing decodes.
        clock: returns seconds.
        chunk: the number of tokens of a call while a sequence is brought to its depth.
    """

    def __init__(
        self, model: StartableModel, steps: int, clock: Callable[[], float] = time.perf_counter, *, chunk: int = CHUNK
    ) -> None:
        self._model = model
        self._steps = steps
        self._clock = clock
        self._chunk = chunk
        self._sessions: dict[Timing, tuple[Session, int]] = {}  # decode timing -> session, its capacity
        self._random = np.random.default_rng(0)

    @property
    def limits(self) -> Limits:
        return self._model.limits

    @property
    def provenance(self) -> Provenance:
        return self._model.provenance

    def speed(self, timing: Timing) -> float:
        if timing.phase is Phase.PREFILL:
            return self._timed(self._model.start(timing.batch, timing.tokens), timing, [timing.tokens])
        session, capacity = self._sessions.pop(timing, (None, 0))
        if session is None or session.length + self._steps > capacity:
            capacity = timing.tokens + max(self._steps, timing.tokens // GROWTH_DIVISOR)
            capacity = min(capacity, self._model.limits.max_context or capacity)
            session = self._model.start(timing.batch, capacity)
            for start in range(0, timing.tokens, self._chunk):
                self._append(session, timing, min(self._chunk, timing.tokens - start))
        self._sessions[timing] = session, capacity
        return self._timed(session, timing, [1] * self._steps)

    def _timed(self, session: Session, timing: Timing, calls: list[int]) -> float:
        start = self._clock()
        for tokens in calls:
            self._append(session, timing, tokens)
        return timing.batch * sum(calls) / (self._clock() - start)

    def _append(self, session: Session, timing: Timing, tokens: int) -> None:
        ids = self._random.integers(0, self._model.config.vocab_size, (timing.batch, tokens), dtype=np.int64)
        session.append(ids, keep=1)  # as generation does


class WorkerProcess:
    """A TimedModel in a new process. ``make`` runs there and returns it, so it must be picklable.

    Raises:
        H1ExportError: an error of the model, or the process ended.
    """

    def __init__(self, make: Callable[[], TimedModel]) -> None:
        context = get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, remote), daemon=True)
        with _safe_path():
            self._process.start()
        remote.close()
        self.limits: Limits = self._receive()
        self.provenance: Provenance = self._receive()

    @property
    def kernels(self) -> str:
        return self.provenance.kernels

    def speed(self, timing: Timing) -> float:
        self._pipe.send(timing)
        return float(self._receive())

    def finish(self) -> int:
        """End the process; return the bytes of its peak memory beyond those that it had before ``make``."""
        self._pipe.send(None)
        peak = int(self._receive())
        self._process.join()
        return peak

    def _receive(self) -> Any:
        try:
            reply = self._pipe.recv()
        except EOFError:
            self._process.join()
            what = f"its process ended with code {self._process.exitcode}"
            raise H1ExportError("benchmark", what, "a negative code is a signal, -9 often a lack of memory") from None
        if isinstance(reply, _Failure):
            raise H1ExportError(reply.where, reply.what, reply.next_step)
        return reply


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let Python processes that are started now import nothing from the working folder, which may be a stranger's."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


@dataclass(frozen=True)
class _Failure:
    where: str
    what: str
    next_step: str


def _serve(make: Callable[[], TimedModel], pipe: Connection) -> None:
    """Run in the worker: send one reply for every request, the last of which is None."""
    before = host.resident_bytes()
    warnings.simplefilter("ignore")  # libraries' warnings are for developers
    try:
        model = make()
        pipe.send(model.limits)
        pipe.send(model.provenance)
        while (timing := pipe.recv()) is not None:
            pipe.send(model.speed(timing))
        pipe.send(host.peak_resident_bytes() - before)
    except (EOFError, KeyboardInterrupt):
        return  # the parent has ended, or is ending too
    except H1ExportError as error:
        pipe.send(_Failure(error.where, error.what, error.next_step))
    except Exception as error:  # of any runtime; the parent reports it, because a worker has no terminal
        pipe.send(_Failure("benchmark", f"{type(error).__name__}: {error}", "report it with the artifact's manifest"))
