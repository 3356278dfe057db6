"""Scheduler: one thread that computes the rows of many requests in turns, token by token.

In each round every text gets one token, by one call for all of them where the runtime takes rows of different lengths.
Then one prompt, in turns, gets one call of at most PREFILL_CHUNK tokens, so that no prompt holds up the texts for
longer. Requests join and leave between calls.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any, Protocol

from h1export.model.falcon_h1.states import Array
from h1export.runtime.prefix_store import PrefixStore
from h1export.runtime.prompt import Prompt
from h1export.runtime.rows import Rows, open_rows
from h1export.runtime.runner import Runner
from h1export.serve.choice import Choice, Failed, Scored, Started, score
from h1export.serve.problems import SERVER, ProblemError

LEAST_WAIT, MOST_WAIT = 1, 60  # seconds of Retry-After


class Watch(Protocol):
    """What is told about the work, for metrics."""

    def began(self, waited: float, tokens: int, reused: int, *, texts: int) -> None:
        """A prompt of ``tokens`` was computed ``waited`` seconds after the request came, and has ``texts`` choices."""
        ...

    def token(self, seconds: float) -> None:
        """A text got a token, ``seconds`` after the one before."""
        ...

    def failed(self, error: BaseException) -> None:
        """A request that was right has ended with an error."""
        ...


@dataclass(eq=False)
class Task:
    """A prompt and the choices that go on from it.

    Attributes:
        ids: The tokens of the prompt.
        choices: The texts.
        borders: The argument of ``Prompt``.
        top: Where the prompt's tokens get scores, the number of likeliest tokens that each has; nothing is reused then.
        is_cancelled: Set by anyone who no longer wants the answer; the rows are free at the next round.
        came: When it was made.
    """

    ids: Sequence[int]
    choices: Sequence[Choice]
    borders: Sequence[int] = ()
    top: int | None = None
    is_cancelled: bool = False
    came: float = field(default_factory=time.monotonic)

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self.is_cancelled = True
        self.choices[0].emit(Failed(error))


@dataclass(eq=False)
class _Prefill:
    task: Task
    prompt: Prompt
    scored: list[Scored] = field(default_factory=list)


@dataclass(eq=False)
class _Row:
    """A choice that goes on.

    Attributes:
        place: What Rows call it.
        token: Its last token.
        since: When that token came.
    """

    task: Task
    choice: Choice
    place: Hashable
    token: int
    since: float


class Scheduler:
    """Computes tasks over one Runner. ``submit`` and ``close`` may be called by any thread.

    Args:
        runner: The artifact.
        store: Where prompts go on from, or None.
        rows: The most choices computed at once.
        queue: The most tasks that wait.
        watch: What is told about the work.
        together: What computes the rows; None takes ``open_rows``.

    Attributes:
        running: The number of choices that are computed.
    """

    def __init__(
        self,
        runner: Runner[Any],
        store: PrefixStore | None,
        *,
        rows: int,
        queue: int,
        watch: Watch,
        together: Rows | None = None,
    ) -> None:
        self._runner = runner
        self._store = store
        self._most_rows = rows
        self._most_waiting = queue
        self._watch = watch
        self._together = open_rows(runner, rows) if together is None else together
        self._condition = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._prefills: deque[_Prefill] = deque()
        self._rows: list[_Row] = []
        self._is_closed = False
        self._seconds = 1.0  # a task's, on average
        self.running = 0
        self._thread = threading.Thread(target=self._run, name="h1export-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of tasks that wait."""
        return len(self._waiting)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Let the tasks be computed, all or none of them.

        Raises:
            ProblemError: A task has too many choices, too many tasks wait, or the scheduler is closed.
        """
        if any(len(task.choices) > self._most_rows for task in tasks):
            raise ProblemError(400, f"n is {self._most_rows} at most on this server", param="n")
        with self._condition:
            if self._is_closed:
                raise ProblemError(503, "the server is stopping", SERVER, code="stopping")
            free = self._most_waiting - len(self._waiting) + max(0, self._most_rows - self.running)
            if len(tasks) > free:
                wait = ceil(self._seconds * (len(self._waiting) + 1) / self._most_rows)
                seconds = min(max(wait, LEAST_WAIT), MOST_WAIT)
                raise ProblemError(
                    429,
                    f"too many requests wait; try again in {seconds} s",
                    "rate_limit_error",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._waiting.extend(tasks)
            self._condition.notify()

    def close(self) -> None:
        """End all tasks with an error, and the thread."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._is_closed or self._waiting or self._prefills or self._rows):
                    self._condition.wait()
                if self._is_closed:
                    break
            self._round()
        stopping = ProblemError(503, "the server is stopping", SERVER, code="stopping")
        left = [*self._waiting, *(one.task for one in self._prefills), *(row.task for row in self._rows)]
        for task in dict.fromkeys(left):
            task.fail(stopping)
        self._waiting.clear()
        self._prefills.clear()
        self._keep([])

    def _round(self) -> None:
        self._keep([row for row in self._rows if not row.task.is_cancelled])
        self._prefills = deque(one for one in self._prefills if not one.task.is_cancelled)
        self._admit()
        if self._rows:
            self._decode()
        if self._prefills:
            one = self._prefills[0]
            self._prefills.rotate(-1)
            self._guarded(one.task, partial(self._prefill, one))
        self.running = self._taken()

    def _keep(self, rows: Collection[_Row]) -> None:
        """Go on with these rows, and let the others leave."""
        for row in self._rows:
            if row not in rows:
                self._together.leave(row.place)
        self._rows = list(rows)

    def _decode(self) -> None:
        """Give every text its next token."""
        tokens = {row.place: row.token for row in self._rows}
        answers: Mapping[Hashable, Array | BaseException]
        try:
            answers = self._together.append(tokens)
        except BaseException as error:
            answers = dict.fromkeys(tokens, error)
        self._keep(
            [row for row in self._rows if self._guarded(row.task, partial(self._decoded, row, answers[row.place]))]
        )

    def _taken(self) -> int:
        """Return the number of rows that are not free."""
        return len(self._rows) + sum(len(one.task.choices) for one in self._prefills)

    def _guarded(self, task: Task, step: Callable[[], bool]) -> bool:
        """Return whether the task goes on after ``step``; whatever fails there ends the task, and no other."""
        if task.is_cancelled:
            return False
        try:
            return step()
        except BaseException as error:  # panics of libraries in Rust are no Exception
            self._fail(task, error)
            return False

    def _fail(self, task: Task, error: BaseException) -> None:
        if not isinstance(error, ProblemError):
            self._watch.failed(error)
        task.fail(error)

    def _admit(self) -> None:
        """Let waiting tasks begin, in order, while there are rows for them."""
        while True:
            with self._condition:
                while self._waiting and self._waiting[0].is_cancelled:
                    self._waiting.popleft()
                if not self._waiting or self._taken() + len(self._waiting[0].choices) > self._most_rows:
                    return
                task = self._waiting.popleft()
                self.running = self._taken() + len(task.choices)
            try:
                store = self._store if task.top is None else None
                prompt = Prompt(self._runner, store, task.ids, borders=task.borders)
            except BaseException as error:
                self._fail(task, error)
                continue
            self._prefills.append(_Prefill(task, prompt))

    def _prefill(self, one: _Prefill) -> bool:
        """Compute a call of a prompt, and return whether there are more."""
        task, prompt = one.task, one.prompt
        logits = prompt.session.append(prompt.next(), keep=1 if task.top is None else None)[0]
        prompt.extended()
        if task.top is not None:
            begin = prompt.session.length - len(logits)
            following = task.ids[begin + 1 : prompt.session.length + 1]
            one.scored += [score(logits[i], token, task.top) for i, token in enumerate(following)]
        if not prompt.is_done:
            return True
        self._prefills.remove(one)
        now = time.monotonic()
        self._watch.began(now - task.came, len(task.ids), prompt.reused, texts=len(task.choices))
        scored = () if task.top is None else (Scored(task.ids[0], None), *one.scored)
        task.choices[0].emit(Started(task.choices[0].index, len(task.ids), prompt.reused, scored))
        sessions = [prompt.session, *(prompt.session.fork() for _ in task.choices[1:])]
        for choice, session in zip(task.choices, sessions, strict=True):
            token = self._next(task, choice, logits[-1])
            if token is not None:
                self._rows.append(_Row(task, choice, self._together.join(session), token, now))
        return False

    def _decoded(self, row: _Row, answer: Array | BaseException) -> bool:
        """Take the logits of a text, or its error, and return whether it goes on."""
        if isinstance(answer, BaseException):
            raise answer
        now = time.monotonic()
        self._watch.token(now - row.since)
        token = self._next(row.task, row.choice, answer)
        if token is None:
            return False
        row.since, row.token = now, token
        return True

    def _next(self, task: Task, choice: Choice, logits: Array) -> int | None:
        """Return the next token of a text, or None where it has ended."""
        token = choice.take(logits)
        if token is None:
            self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - task.came)
        return token
