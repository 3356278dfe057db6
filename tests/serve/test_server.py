"""The command, its signals and its keys."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serve_texts import user

from h1export.cli import run
from h1export.errors import H1ExportError
from h1export.serve.app import Api
from h1export.serve.keys import ApiKeys
from h1export.serve.metrics import Metrics
from h1export.serve.server import Server, named


def test_the_command_serves_until_it_is_told_to_stop(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It says where it listens; a stream that runs at SIGTERM comes to its end, and the exit code is 0."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    told: list[int] = []

    def tell() -> None:
        if not told:  # once: after the server's end a signal would end pytest
            told.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    def ask() -> list[str | None]:
        for _ in range(600):
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.05)
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
                how: Any = {"max_tokens": 150, "logit_bias": {"1": -100, "3": -100}, "stream": True}
                stream = client.chat.completions.create(model="mine", messages=[user("import os")], **how)
                next(stream)
                tell()
                return [chunk.choices[0].finish_reason for chunk in stream]
        finally:
            tell()

    before = signal.getsignal(signal.SIGTERM)
    options = ("--port", str(port), "--kernels", "stock", "--threads", "1", "--json")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        assert run(["serve", f"mine={out}", *options]) == 0
        reasons = asked.result()
    assert len(reasons) > 20
    assert reasons[-1] == "length"
    said = capfd.readouterr()
    assert json.loads(said.out) == {"url": url, "models": ["mine"]}
    assert said.err == f"serving mine at {url}\n"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{url}/health")


def test_what_cannot_be_served_is_one_line(
    out: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = server.url.rpartition(":")[2]
    (tmp_path / "keys").write_text("# none\n")
    (tmp_path / "short").write_text("abc\n")
    cases = {
        ("serve", str(out), "--port", port): "cannot listen there",
        ("serve", str(out), str(out), "--port", "0"): "is given twice",
        ("serve", str(tmp_path), "--port", "0"): "no manifest.json",
        ("serve", str(out), "--port", "0", "--host", "256.0.0.1"): "cannot listen there",
        ("serve", str(out), "--port", "0", "--keys", str(tmp_path / "keys")): "has 0 keys",
        ("serve", str(out), "--port", "0", "--keys", str(tmp_path / "short")): "a line that is no key",
        ("serve", str(out), "--port", "0", "--keys", str(tmp_path / "none")): "no keys can be read",
    }
    for arguments, message in cases.items():
        assert run([*arguments]) == 2
        said = capfd.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert message in said.err


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    folder = str(tmp_path / "a=b")
    assert named([folder, "x=y=z"]) == {"a=b": Path(folder), "x": Path("y=z")}
    for wrong in (["=x"], ["a=1", "a=2"], ["\n=x"]):
        with pytest.raises(H1ExportError, match="give NAME=OUT"):
            named(wrong)


def test_keys(server: Server, tmp_path: Path) -> None:
    """Everything but /health needs a key of the file, and nothing tells which keys there are."""
    (tmp_path / "keys").write_text("# ours\nfirst-key-1\n\n  second-key-2  \n")
    lines: list[str] = []
    keys = ApiKeys.read(tmp_path / "keys")
    app = Api(server.models, Metrics(), keys, report=lines.append).application()

    async def statuses() -> dict[str, int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            found = {"health": (await client.get("/health")).status_code}
            for name, value in {
                "none": None,
                "first": "Bearer first-key-1",
                "second": "bearer second-key-2",
                "wrong": "Bearer first-key-2",
                "basic": "Basic first-key-1",
                "comment": "Bearer # ours",
                "empty": "Bearer ",
                "latin": "Bearer \xff",
            }.items():
                headers = {} if value is None else {"Authorization": value.encode("latin-1")}
                answer = await client.get("/v1/models", headers=headers)
                found[name] = answer.status_code
                assert answer.status_code == 200 or answer.headers["WWW-Authenticate"] == "Bearer"
                assert (await client.get("/metrics", headers=headers)).status_code == answer.status_code
            body = {"model": "tiny", "prompt": "x"}
            found["post"] = (await client.post("/v1/completions", json=body)).status_code
            return found

    found = asyncio.run(statuses())
    assert {name for name, status in found.items() if status == 200} == {"health", "first", "second"}
    assert set(found.values()) == {200, 401}
    assert lines == []


def test_a_failure_while_a_text_is_computed_is_a_500(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what failed is one of our own errors, with a path in it; a stream has it as an event."""

    def fail(*_: object) -> None:
        raise H1ExportError("/secret/place", "cannot compute", "build it again")

    monkeypatch.setattr(server.models["tiny"].scheduler, "_decoded", fail)
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="the server failed with H1ExportError") as caught:
            list(client.completions.create(model="tiny", prompt="x", temperature=0, max_tokens=3, stream=stream))
        assert caught.value.code == "internal_error"
    monkeypatch.undo()
    assert client.completions.create(model="tiny", prompt="x", max_tokens=3).choices[0].text


def test_an_error_of_ours_is_a_500_without_its_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    app = Api(server.models, Metrics(), None, report=lines.append).application()

    def fail(*_: object) -> None:
        raise RuntimeError("a secret of /etc")

    monkeypatch.setattr(server.models["tiny"], "prepare", fail)

    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as client:
            return await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    (line,) = lines
    assert re.fullmatch(
        r"/v1/completions: RuntimeError: a secret of /etc \(test_server\.py:\d+\); the other requests go on", line
    )
