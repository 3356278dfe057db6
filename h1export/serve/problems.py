"""ProblemError: an answer that says what is wrong with a request, in the API's own form and with an HTTP status."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from h1export.errors import MOST_SHOWN, H1ExportError, printable, reason, shortened

INVALID = "invalid_request_error"
SERVER = "server_error"


class ProblemError(Exception):
    """A request that is not answered.

    Args:
        status: The HTTP status.
        message: One line for the user, which is cut where it is long.
        kind: The ``type`` of the error.
        param: The field at fault, if it is one.
        code: A short name of the error for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = printable(shortened(" ".join(message.split()), MOST_SHOWN))
        self.kind = kind
        self.param = None if param is None else printable(shortened(param, MOST_SHOWN // 4))
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """Return the JSON value of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def as_problem(error: BaseException) -> ProblemError:
    """Return what the client is told about an error of its request, which it can put right, or of the server."""
    if isinstance(error, H1ExportError):  # without its place, which may be a path of this machine
        return ProblemError(400, f"{error.what}; {error.next_step}")
    return failure(error)


def failure(error: BaseException) -> ProblemError:
    """Return what the client is told about an error of a request that was right; what failed stays here."""
    if isinstance(error, ProblemError):
        return error
    return ProblemError(500, f"the server failed with {type(error).__name__}", SERVER, code="internal_error")


def for_operator(where: str, error: BaseException) -> str:
    """Return a line about an error of a request that was right: where, which, its reason, and the place that raised.

    It is for whoever runs the server; the client gets ``failure``.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return printable(f"{where}: {type(error).__name__}: {reason(error)}{place}; the other requests go on")
