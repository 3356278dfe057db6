"""One request and its answer on the wire: the body with its limits, the client that goes away, and streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, MutableMapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from h1export.serve.answers import Answer
from h1export.serve.choice import Event
from h1export.serve.problems import ProblemError, as_problem

MOST_BODY = 8 << 20  # bytes
JSON_TYPE = "application/json"
T = TypeVar("T")


class GoneError(Exception):
    """The client has closed the connection."""


class Channel:
    """Events on their way from the scheduler's thread to the event loop that made this object."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def emit(self, event: Event) -> None:
        """Pass an event on; called by any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """Return the next event."""
        return await self._queue.get()


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        ProblemError: It is not said to be JSON, or is too large.
        GoneError: The client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:  # which pages of other sites cannot send without being asked
        raise ProblemError(415, f"the body has to be {JSON_TYPE}, and the header Content-Type has to say so")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                close = {"Connection": "close"}
                raise ProblemError(413, f"the body has more than {MOST_BODY} bytes", code="too_large", headers=close)
    except ClientDisconnect:
        raise GoneError from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns. It is cancelled where the client goes away, and GoneError is raised."""
    watcher = asyncio.ensure_future(_gone(receive))
    worker = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watcher, worker}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise GoneError
    finally:
        for task in (watcher, worker):
            task.cancel()
        await asyncio.gather(watcher, worker, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while True:
        message: MutableMapping[str, Any] = await receive()
        if message["type"] == "http.disconnect":
            return


async def whole(channel: Channel, answer: Answer) -> dict[str, Any]:
    """Return the whole answer. Raises ProblemError where an event is an error."""
    while not answer.is_done:
        answer.take(await channel.next())
    return answer.whole()


async def chunks(channel: Channel, answer: Answer, usage: bool) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of an answer; with ``usage`` the last one has the numbers of tokens."""
    while not answer.is_done:
        for choice in answer.take(await channel.next()):
            yield answer.chunk([choice], usage)
    if usage:
        yield answer.chunk([], usage, counts=True)


async def next_of(stream: AsyncIterator[T]) -> T:
    """Return the next item."""
    return await anext(stream)


class EventStream(Response):
    """Server-sent events: ``first`` and what follows it, to their end, to an error, or until the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], then: Any) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._then = then

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; ``then`` is called however it ends."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))
        except (GoneError, OSError):
            pass
        finally:
            self._then()

    async def _send(self, send: Send) -> None:
        await _send_event(send, json.dumps(self._first))
        try:
            async for chunk in self._rest:
                await _send_event(send, json.dumps(chunk))
        except Exception as error:  # the status was sent already
            await _send_event(send, json.dumps(as_problem(error).body()))
        else:
            await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def refusal(error: BaseException) -> JSONResponse:
    """Return the answer to a request that failed."""
    problem = as_problem(error)
    return JSONResponse(problem.body(), problem.status, headers=problem.headers)
