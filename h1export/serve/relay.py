"""Relay: an ASGI application that lets other servers answer, and the other side of it.

A request is read whole and passed on with its body, and the messages of its answer come back one by one. A server that
ends before anything of its answer was sent is no failure: another one is asked. One that ends later leaves an answer
that says so, in the form of any other error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from h1export.serve.affinity import affinity
from h1export.serve.exchange import MOST_BODY, GoneError, refusal, unless_gone
from h1export.serve.problems import SERVER, ProblemError

ACCEPTED = "h1export.accepted"  # the type of the first message: a server has taken the request
EVENTS = b"event-stream"
START, BODY = "http.response.start", "http.response.body"
PARTS = ("type", "asgi", "http_version", "method", "scheme", "root_path", "path", "raw_path", "query_string", "headers")
SECONDS = 1  # of Retry-After


@dataclass(frozen=True)
class Request:
    """A request that was read.

    Attributes:
        scope: The parts of ASGI's scope that a server needs, all of them plain values.
        body: Its body, which may be longer than any server takes, and is cut then.
        key: Requests with the same key should go to the same server; without one, to any.
    """

    scope: dict[str, Any]
    body: bytes
    key: str


Ask = Callable[[Request], AsyncGenerator[Message, None]]


class LostError(Exception):
    """The server that was asked has ended."""


class FullError(Exception):
    """All servers have as much to do as they take."""


class Relay:
    """The ASGI application.

    Args:
        ask: Passes a request on; yields a message of the type ACCEPTED and those of the answer, and raises LostError or
            FullError.
        retries: How often another server is asked.
        patience: The seconds that a request may wait until a server takes it.
    """

    def __init__(self, ask: Ask, retries: int, patience: float) -> None:
        self._ask = ask
        self._retries = retries
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. There is nothing to do when the server around it starts or ends."""
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        body = await _body(receive)
        if body is None:
            return
        plain = {name: scope[name] for name in PARTS if name in scope}
        request = Request(plain, body, affinity(scope["headers"], body))
        begun: list[Message] = []  # the beginning of the answer, once it was sent
        try:
            await unless_gone(receive, self._answer(request, begun, send))
        except GoneError:
            return
        except ProblemError as problem:
            if not begun:
                await refusal(problem)(scope, receive, send)
            elif any(name == b"content-type" and EVENTS in value for name, value in begun[0].get("headers", ())):
                data = f"data: {json.dumps(problem.body())}\n\n".encode()
                await send({"type": BODY, "body": data, "more_body": False})
            else:
                raise  # the connection is closed: nothing else tells that the answer is not whole

    async def _answer(self, request: Request, begun: list[Message], send: Send) -> None:
        """Send an answer; raise ProblemError where there is none, or only a part of it."""
        for _ in range(self._retries + 1):
            try:
                return await self._pass(request, begun, send)
            except LostError:
                if begun:
                    break
            except FullError:
                what, headers = f"too many requests wait; try again in {SECONDS} s", {"Retry-After": str(SECONDS)}
                raise ProblemError(429, what, "rate_limit_error", code="queue_full", headers=headers) from None
            except TimeoutError:
                raise _unavailable("no server has taken the request in time", "unavailable") from None
        raise _unavailable("the server that computed the answer has ended", "server_lost")

    async def _pass(self, request: Request, begun: list[Message], send: Send) -> None:
        """Send an answer; its beginning waits for the first part of its body, so that a failure can still follow."""
        messages = self._ask(request)
        held: Message = {}
        try:
            await asyncio.wait_for(anext(messages), self._patience)
            async for message in messages:
                if message["type"] == START:
                    held = message
                    continue
                if not begun:
                    begun.append(held)
                    await send(held)
                await send(message)
        finally:
            await messages.aclose()


def _unavailable(what: str, code: str) -> ProblemError:
    return ProblemError(503, what, SERVER, code=code, headers={"Retry-After": str(SECONDS)})


async def _body(receive: Receive) -> bytes | None:
    """Return the body of a request, or a part that is longer than a server takes; None where the client has gone."""
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        found += message.get("body", b"")
        if not message.get("more_body", False) or len(found) > MOST_BODY:
            return bytes(found[: MOST_BODY + 1])


async def answers(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Yield a message of the type ACCEPTED and those of the answer of ``app``; closing it ends the work.

    Args:
        app: The application that answers.
        scope: The scope of a Request.
        body: Its body.
    """
    yield {"type": ACCEPTED}
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if given:
            return given.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    work = asyncio.ensure_future(app(scope, receive, sent.put))
    work.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
