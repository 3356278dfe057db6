"""TemplateProcess: a process in which chat templates are rendered, with limits of time, output and memory.

A template comes with a checkpoint, and may loop for ever or fill the memory. No check of its text can tell, and no
Python code can be interrupted everywhere, so it runs where it can be ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread
from typing import IO, Any

import psutil

from h1export.errors import H1ExportError
from h1export.runtime.sharing import Home

WORKER = Path(__file__).with_name("template_worker.py")
DEPENDENCIES = ("jinja2", "markupsafe")
START = 60.0  # seconds that a new process may take on a busy machine
TICK = 0.02  # seconds between two looks at the memory
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # of the environment; the rest may be secrets


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may take.

    Attributes:
        seconds: The time on the clock.
        characters: The length of the text.
        memory: Bytes of the whole process.
    """

    seconds: float = 1.0
    characters: int = 8 << 20
    memory: int = 384 << 20


class RenderError(Exception):
    """A template was not rendered.

    Attributes:
        kind: "refused", "syntax", "failed", "large", "slow" or "crashed".
        what: A short line for the user, which may have the template's own message.
    """

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


class TemplateProcess:
    """Renders templates in a process that starts when first needed, and again after it had to be ended.

    Threads may share it: one renders at a time. A process that was forked from this one cannot use it.
    """

    def __init__(self, limits: RenderLimits = RenderLimits()) -> None:
        self._limits = limits
        self._home = Home("chat template")
        self._lock = Lock()
        self._worker: _Worker | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Return the text of ``template`` with ``variables``, which are JSON values.

        Raises:
            RenderError: The template cannot be rendered, or not within the limits.
            H1ExportError: No process can be started, or this one is a fork.
        """
        self._home.check()
        request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        with self._lock:
            if self._worker is None or self._worker.has_ended:
                self._close()
                self._worker = _Worker(self._limits)
            try:
                answer = self._worker.ask(request, self._limits.seconds)
            except BaseException:
                self._close()
                raise
            if answer.get("error") == "large":
                self._close()  # what is left of its memory may not do for the next one
        if "error" in answer:
            raise RenderError(answer["error"], answer["what"])
        return answer["text"]

    def close(self) -> None:
        """End the process. In a fork it is left to the process that started it."""
        if not self._home.is_here:
            return
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Worker:
    """A running template_worker.py. It is ended together with this object, and with this process."""

    def __init__(self, limits: RenderLimits) -> None:
        self._memory = limits.memory
        settings = {
            "paths": module_paths(),
            "characters": limits.characters,
            "memory": limits.memory,
            "seconds": ceil(limits.seconds),
        }
        if not sys.executable:
            raise H1ExportError(
                "chat template", "this program has no Python interpreter to render it with", "run h1export in Python"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone
        )
        self.close = weakref.finalize(self, _end, self._process, os.getpid())
        self._lines: Queue[bytes] = Queue()
        longest = 6 * limits.characters + 1024  # JSON may write a character as six
        Thread(target=_read, args=(self._process.stdout, self._lines, longest), daemon=True).start()
        try:
            self._answer(START)
        except RenderError as error:
            self.close()
            raise H1ExportError(
                "chat template", f"the process that renders it does not start ({error})", "check the installation"
            ) from None

    @property
    def has_ended(self) -> bool:
        """Whether the process is no more; something else may have ended it since its last answer."""
        return self._process.poll() is not None

    def ask(self, request: bytes, seconds: float) -> dict[str, str]:
        """Return the worker's answer to ``request``; raise RenderError where it has none after ``seconds``."""
        assert self._process.stdin is not None
        with suppress(OSError):  # a worker that has ended gives no answer, either
            self._process.stdin.write(request)
            self._process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, str]:
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=TICK)
                break
            except Empty:
                if time.monotonic() > end:
                    raise RenderError("slow", f"takes more than {seconds:g} s") from None
                if self._resident() > self._memory:  # where the OS does not limit the process itself
                    raise RenderError("large", "takes more memory than a template may have") from None
        try:
            answer: dict[str, str] = json.loads(line)
        except ValueError:
            raise RenderError("crashed", "ends the process that renders it") from None
        return answer

    def _resident(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0


def module_paths() -> list[str]:
    """Return the folders from which the worker imports jinja2: it reads neither site-packages nor PYTHONPATH."""
    paths = []
    for name in DEPENDENCIES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise H1ExportError(name, "is not installed", f"pip install {name}")
        paths.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(paths))


def _read(stream: IO[bytes], lines: Queue[bytes], longest: int) -> None:
    """Put every line of ``stream`` into ``lines``, and an empty one at its end."""
    line = b"\n"
    while line.endswith(b"\n"):
        line = stream.readline(longest)
        lines.put(line)


def _end(process: subprocess.Popen[bytes], parent: int) -> None:
    if os.getpid() != parent:  # a fork, which ends before the process that needs the worker
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # what was not written yet has no reader
                stream.close()
