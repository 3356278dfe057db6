"""A relay passes requests on and answers back unchanged, asks another server for a lost one, and never hangs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from h1export.serve.affinity import affinity
from h1export.serve.exchange import MOST_BODY
from h1export.serve.relay import FullError, LostError, Relay, Request, answers

PARTS = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]


async def echo(request: HttpRequest) -> Response:
    body = await request.body()
    seen = {"path": request.url.path, "query": request.url.query, "size": len(body), "x": request.headers.get("x-a")}
    return JSONResponse(seen, 201, {"X-B": "c"})


async def events(request: HttpRequest) -> Response:
    async def parts() -> Any:
        for part in PARTS:
            yield part
            await asyncio.sleep(0)

    return StreamingResponse(parts(), media_type="text/event-stream")


async def forever(request: HttpRequest) -> Response:
    async def parts() -> Any:
        try:
            while True:
                yield PARTS[0]
                await asyncio.sleep(0.001)
        finally:
            ENDED.append(request.url.path)

    return StreamingResponse(parts(), media_type="text/event-stream")


ENDED: list[str] = []
APP = Starlette(
    routes=[Route("/echo", echo, methods=["GET", "POST"]), Route("/events", events), Route("/forever", forever)]
)


class Servers:
    """Ask APP; the first ``lost`` calls end after ``after`` messages of the answer."""

    def __init__(self, lost: int = 0, after: int = 0, error: type[Exception] = LostError) -> None:
        self.lost, self.after, self.error = lost, after, error
        self.asked = list[Request]()

    async def ask(self, request: Request) -> AsyncGenerator[Any, None]:
        self.asked.append(request)
        fails = len(self.asked) <= self.lost
        place = 0
        async for message in answers(APP, request.scope, request.body):
            if fails and place == self.after:
                raise self.error
            yield message
            place += 1

    def get(self, path: str, retries: int = 2, patience: float = 20.0, **how: Any) -> httpx2.Response:
        async def go() -> httpx2.Response:
            transport = httpx2.ASGITransport(app=Relay(self.ask, retries, patience))
            async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request("POST" if "content" in how else "GET", path, **how)

        return asyncio.run(go())


@pytest.mark.parametrize("size", [0, 10, MOST_BODY, MOST_BODY + 1])
def test_an_answer_is_that_of_the_application(size: int) -> None:
    found = Servers().get("/echo?y=1", content=b"x" * size, headers={"X-A": "b"})
    assert (found.status_code, found.headers["X-B"]) == (201, "c")
    assert found.json() == {"path": "/echo", "query": "y=1", "size": size, "x": "b"}
    assert Servers().get("/events").content == b"".join(PARTS)
    assert Servers().get("/none").status_code == 404


@pytest.mark.parametrize(("path", "after"), [("/echo", 0), ("/echo", 1), ("/echo", 2), ("/events", 1), ("/events", 2)])
def test_a_lost_request_goes_to_another_server(path: str, after: int) -> None:
    """Until the first part of a body was sent, nobody notices; not more often than said."""
    servers = Servers(lost=2, after=after)
    assert servers.get(path).content == Servers().get(path).content
    assert len(servers.asked) == 3
    servers = Servers(lost=3, after=after)
    found = servers.get(path)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "server_lost")
    assert found.headers["Retry-After"] == "1"
    assert len(servers.asked) == 3


def test_a_stream_that_breaks_off_says_so() -> None:
    servers = Servers(lost=9, after=3)
    found = servers.get("/events")
    first, last, _ = found.text.split("\n\n")
    assert f"{first}\n\n".encode() == PARTS[0]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_lost"
    assert len(servers.asked) == 1


def test_full_servers_and_slow_ones() -> None:
    found = Servers(lost=9, error=FullError).get("/echo")
    assert (found.status_code, found.headers["Retry-After"]) == (429, "1")
    assert found.json()["error"]["code"] == "queue_full"

    async def wait(request: Request) -> AsyncGenerator[Any, None]:
        await asyncio.sleep(60)
        yield {}

    servers = Servers()
    servers.ask = wait  # type: ignore[method-assign]
    found = servers.get("/echo", patience=0.05)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "unavailable")


def test_a_client_that_goes_away_ends_the_work() -> None:
    servers = Servers()
    sent: list[Any] = []

    async def go() -> None:
        gone = asyncio.Event()
        given = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 4:
                gone.set()

        scope = {"type": "http", "method": "GET", "path": "/forever", "query_string": b"", "headers": []}
        await asyncio.wait_for(Relay(servers.ask, 2, 20)(scope, receive, send), 20)

    ENDED.clear()
    asyncio.run(go())
    assert ENDED == ["/forever"]


def key(body: Any, session: str = "") -> str:
    headers = [(b"x-session-id", session.encode())] if session else []
    return affinity(headers, body if isinstance(body, bytes) else json.dumps(body).encode())


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": "m", "messages": messages, **fields}


def test_requests_of_one_conversation_have_one_key() -> None:
    first = key(chat("s", "u"))
    assert first
    assert key(chat("s", "u", "a", "v")) == first
    assert key(chat("s", "u", "b", "w", "c", "x", temperature=1)) == first
    others = [chat("s", "v"), chat("t", "u"), chat("s", "u", model="n"), {"model": "m", "prompt": "s"}]
    assert len({first, *map(key, others)}) == 5
    assert key({"model": "m", "prompt": "x" * 2000 + "a"}) == key({"model": "m", "prompt": "x" * 2000 + "b"})
    for fields in ({"prompt_cache_key": "k"}, {"prompt_cache_key": "k", "temperature": 1}):
        assert key(chat("s", "u", **fields)) == key({"prompt_cache_key": "k"})
    assert key(chat("a"), "me") == key(b"", "me") != key(b"", "you")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    body=st.binary(max_size=30)
    | st.dictionaries(st.sampled_from(["model", "messages", "prompt", "prompt_cache_key"]), VALUES),
    session=st.binary(max_size=5),
)
def test_any_request_has_a_key_or_none(body: Any, session: bytes) -> None:
    """Whatever is sent: the key is short, and the same again."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found: Callable[[], str] = lambda: affinity([(b"x-session-id", session)], raw)  # noqa: E731
    assert found() == found()
    assert len(found()) in (0, 64)
