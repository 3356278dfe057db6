"""Clients of a server that speaks OpenAI's API: what they ask, and what they see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx2
import numpy as np
import openai

PREFIX = 1024  # tokens that prompts share


class Load(StrEnum):
    """What the prompts are like; the value is their name in the table."""

    SHORT = "short"  # 32 tokens of their own, 64 new ones
    SHARED = "shared 1K prefix"  # 1024 tokens that all share, 32 of their own, 64 new ones
    OWN = "own 1K prefix"  # as many tokens, of which none is shared
    MIXED = "mixed lengths"  # 16 to 512 tokens, 16 to 128 new ones


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens follow it."""

    ids: tuple[int, ...]
    new: int


@dataclass(frozen=True)
class Seen:
    """What the client of one request saw.

    Attributes:
        first: Seconds until the first token.
        gaps: Seconds between one event and the next.
        tokens: The number of new tokens.
    """

    first: float
    gaps: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Figures:
    """All requests of one load.

    Attributes:
        tokens_per_second: New tokens of all clients.
        first: Median and 99th percentile of the seconds until the first token.
        gap: Median and 99th percentile of the seconds between tokens.
    """

    tokens_per_second: float
    first: tuple[float, float]
    gap: tuple[float, float]

    @classmethod
    def of(cls, seen: Sequence[Seen], seconds: float) -> Figures:
        """Summarise requests that took ``seconds`` together."""
        gaps = [gap for one in seen for gap in one.gaps]
        return cls(
            sum(one.tokens for one in seen) / seconds,
            _middle_and_high([one.first for one in seen]),
            _middle_and_high(gaps or [0.0]),
        )


def _middle_and_high(values: Sequence[float]) -> tuple[float, float]:
    return float(np.median(values)), float(np.percentile(values, 99))


def requests(load: Load, count: int, vocabulary: int, *, seed: int) -> list[Request]:
    """Return ``count`` random requests; another seed gives other prompts, the shared prefix included."""
    rng = np.random.default_rng(seed)

    def ids(tokens: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(100, vocabulary, tokens))

    shared = ids(PREFIX)
    if load is Load.SHORT:
        return [Request(ids(32), 64) for _ in range(count)]
    if load is Load.SHARED:
        return [Request(shared + ids(32), 64) for _ in range(count)]
    if load is Load.OWN:
        return [Request(ids(PREFIX + 32), 64) for _ in range(count)]
    return [Request(ids(int(rng.integers(16, 513))), int(rng.integers(16, 129))) for _ in range(count)]


async def _ask(client: openai.AsyncOpenAI, model: str, request: Request) -> Seen:
    start = last = time.perf_counter()
    first, gaps, tokens = 0.0, [], 0
    stream = await client.completions.create(
        model=model,
        prompt=list(request.ids),
        max_tokens=request.new,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        now = time.perf_counter()
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if not chunk.choices:
            continue
        if first == 0.0:
            first = now - start
        else:
            gaps.append(now - last)
        last = now
    return Seen(first, tuple(gaps), tokens)


async def _run(url: str, model: str, wanted: Sequence[Request], *, clients: int) -> Figures:
    waiting = list(reversed(wanted))
    seen: list[Seen] = []

    async def one(client: openai.AsyncOpenAI) -> None:
        while waiting:
            seen.append(await _ask(client, model, waiting.pop()))

    # a connection of its own for each request, because servers close idle ones when they like
    fresh = openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_keepalive_connections=0))
    how: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 3600, "http_client": fresh}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", **how) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return Figures.of(seen, time.perf_counter() - start)


def run(url: str, model: str, wanted: Sequence[Request], *, clients: int) -> Figures:
    """Let so many clients ask the server until every request is answered, each one after the other."""
    return asyncio.run(_run(url, model, wanted, clients=clients))
