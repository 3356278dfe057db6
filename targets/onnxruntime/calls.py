"""What ONNX Runtime says when it cannot load or compute a graph, as this project's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from h1export.errors import H1ExportError, shortened

SHOWN = 200  # characters of its message, which may quote a graph at any length


@contextmanager
def refused(where: object, what: str, next_step: str = "build the artifact again") -> Iterator[None]:
    """Turn any exception of ONNX Runtime, whose types share no base class, into one about ``where``.

    Raises:
        H1ExportError: ONNX Runtime raised; the last line of its message is quoted.
    """
    try:
        yield
    except H1ExportError:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise H1ExportError(where, f"{what} ({shortened(text, SHOWN)})", next_step) from None


class Serial:
    """An InferenceSession that runs one call at a time; others wait.

    A session whose runs are captured as CUDA graphs must not run in several threads at once: "CUDA Execution Provider",
    section "Using CUDA Graphs", of ONNX Runtime's documentation.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._lock = Lock()

    def run(self, *arguments: Any) -> Any:
        with self._lock:
            return self._session.run(*arguments)

    def run_with_ort_values(self, *arguments: Any) -> Any:
        with self._lock:
            return self._session.run_with_ort_values(*arguments)

    def run_with_iobinding(self, *arguments: Any) -> Any:
        with self._lock:
            return self._session.run_with_iobinding(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
