"""A server in a thread, over one artifact under two names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import httpx2
import openai
import pytest

from h1export.artifact.artifact import Artifact
from h1export.serve.model import Room
from h1export.serve.server import Place, Server

ROWS, QUEUE = 4, 12


@pytest.fixture(scope="session")
def out(tiny: Path, build: Callable[..., Artifact]) -> Path:
    """The artifact, whose activations are rounded to int8: other calls would give other logits."""
    return build(tiny, "int4", accuracy_level=4).folder


@pytest.fixture(scope="session")
def server(out: Path) -> Iterator[Server]:
    made = Server({"tiny": out, "again": out}, Place(port=0), Room(ROWS, QUEUE, 64 << 20), kernels="native", threads=1)
    thread = Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as made:
        yield made
