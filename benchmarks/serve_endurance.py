"""A server under thousands of requests, right ones, wrong ones, and some whose clients go away: answers and memory.

    python benchmarks/serve_endurance.py OUT --requests 10000

Of the requests, each is compared with what `h1export generate` writes for the same prompt, sampling and seed. Beside
them go random wrong bodies, which have to be refused with 4xx, and streams that are left in the middle. Memory is that
of the server's process at rest, after the first fifth. The exit code is 1 where an answer was wrong. Needs the extra
`serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
from build import status_bytes
from serve import Server, free_port, started

from h1export.commands.generate import generate_text
from h1export.runtime.generation import Sampling

CLIENTS = 8
TOKENS = 12
WRONG_EVERY, LEFT_EVERY = 5, 50  # requests between two wrong ones, and between two streams that are left
SAMPLE_EVERY = 250  # requests between two looks at the memory, for which the server is left alone
REST = 0.5  # seconds without a request before a look
PROMPTS = ("import os", "def f(x):\n    return", "class A:\n" + "    x = 1\n" * 60, "# " + "words of a comment " * 40)
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.5, "seed": 8, "top_p": 0.9, "top_k": 50},
)
JUNK: tuple[Any, ...] = (
    None,
    -1,
    1e999,
    10**30,
    "x",
    "",
    [],
    {},
    [[]],
    [None],
    {"a": [1]},
    True,
    "\u0000",
    ["x"] * 300,
)
FIELDS = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "n",
    "stop",
    "seed",
    "logprobs",
    "tools",
    "stream",
)


@dataclass(frozen=True)
class Case:
    """A right request, and the text that answers it."""

    chat: bool
    prompt: str
    sampling: dict[str, Any]
    text: str

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        """The request."""
        asked = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {"model": "model", "max_tokens": TOKENS, **asked, **self.sampling}


@dataclass
class Found:
    """What went wrong, and the memory of the server's process in bytes at each look."""

    faults: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)


def cases(out: Path) -> list[Case]:
    """Return every prompt with every sampling, as a text and as a chat."""
    return [
        Case(
            chat,
            prompt,
            how,
            "".join(generate_text(out, prompt, TOKENS, sampling=Sampling(**how), chat=chat, threads=1)),
        )
        for prompt in PROMPTS
        for how in SAMPLINGS
        for chat in (False, True)
    ]


def wrong_body(body: dict[str, Any], rng: random.Random) -> bytes:
    """Return a body with random faults, or with parts missing; it may be right by chance."""
    changed = dict(body)
    for name in rng.sample(FIELDS, rng.randint(1, 3)):
        changed[name] = rng.choice(JUNK)
    if rng.random() < 0.3:
        changed.pop(rng.choice(list(changed)))
    if changed.get("max_tokens") is None:
        changed["max_tokens"] = TOKENS  # one that is right by chance is as short as the others
    data = json.dumps(changed).encode()
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))] + rng.choice((b"", b"\xff", b"}", b"[" * 5000))
    return data


async def ask(client: httpx2.AsyncClient, case: Case, found: Found) -> None:
    """Ask for a whole answer, and compare it."""
    answer = await client.post(case.path, json=case.body)
    found.statuses[answer.status_code] += 1
    text = ""
    if answer.status_code == 200:
        (choice,) = answer.json()["choices"]
        text = choice["message"]["content"] if case.chat else choice["text"]
    if text != case.text:
        found.faults.append(f"{answer.status_code} {case.prompt[:20]!r} {case.sampling}: {text[:60]!r}")


async def leave(client: httpx2.AsyncClient, case: Case) -> None:
    """Go away after the first event of a stream."""
    async with client.stream("POST", case.path, json={**case.body, "max_tokens": 500, "stream": True}) as answer:
        async for _ in answer.aiter_lines():
            return


async def be_wrong(client: httpx2.AsyncClient, case: Case, found: Found, *, rng: random.Random) -> None:
    """Send a wrong body: anything but a refusal in the API's form is a fault, unless the body is right by chance."""
    data = wrong_body(case.body, rng)
    answer = await client.post(case.path, content=data, headers={"Content-Type": "application/json"})
    found.statuses[answer.status_code] += 1
    refused = 400 <= answer.status_code < 500 and answer.json().keys() == {"error"}
    if not refused and answer.status_code != 200:
        found.faults.append(f"{answer.status_code} for {data[:80]!r}")


async def run(server: Server, right: Sequence[Case], count: int) -> Found:
    """Ask ``count`` right requests, CLIENTS at a time, and the others beside them."""
    found = Found()

    async def one(client: httpx2.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            case, rng = right[number % len(right)], random.Random(number)
            await ask(client, case, found)
            if number % WRONG_EVERY == 0:
                await be_wrong(client, case, found, rng=rng)
            if number % LEFT_EVERY == 0:
                await leave(client, case)

    async with httpx2.AsyncClient(base_url=server.url, timeout=600) as client:
        for start in range(0, count, SAMPLE_EVERY):
            stop = min(start + SAMPLE_EVERY, count)
            numbers = iter(range(start, stop))
            await asyncio.gather(*(one(client, numbers) for _ in range(CLIENTS)))
            await asyncio.sleep(REST)
            found.memory.append(status_bytes(server.pid, "VmRSS"))
            print(stop, f"{found.memory[-1] / 1e6:.1f} MB", f"{len(found.faults)} faults", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an artifact with a tokenizer and a chat template")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--log", type=Path, default=Path("serve.log"), help="where the server's own output goes")
    args = parser.parse_args()
    right = cases(args.out)
    port = free_port()
    command = [str(Path(sys.executable).with_name("h1export")), "serve", f"model={args.out}", "--port", str(port)]
    with started(
        "h1export", [*command, "--rows", str(CLIENTS), "--threads", "1"], "model", port=port, log=args.log
    ) as it:
        found = asyncio.run(run(it, right, args.requests))
    later = found.memory[len(found.memory) // 5 :] or [0]
    middle = median(later)
    spread = [f"{100 * (size / middle - 1):+.1f} %" for size in (min(later), max(later))] if middle else []
    print(f"statuses {dict(found.statuses)}; memory {middle / 1e6:.1f} MB, {' to '.join(spread)}")
    for fault in found.faults[:20]:
        print("fault:", fault)
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
