"""The chat page in headless Chromium: it streams answers, shows texts as texts, and asks nobody but its own server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from chromium import DESKTOP, PHONE, Browser
from serve_texts import user

from h1export.serve.app import Api
from h1export.serve.keys import ApiKeys
from h1export.serve.metrics import Metrics
from h1export.serve.server import Server

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=2</script><b id=bold>&amp;'
COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
pages = pytest.mark.chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def until(browser: Browser, condition: str) -> None:
    """Wait until an expression of the page is true."""
    script = f"""new Promise(done => {{ const begin = Date.now(); const look = () => {{
        if ({condition}) done("yes"); else if (Date.now() - begin > 30000) done("no"); else setTimeout(look, 20); }};
        look(); }})"""
    assert browser.value(script) == "yes", condition


def ask(browser: Browser, text: str) -> None:
    """Type a message, and send it with the Enter key."""
    browser.value("document.getElementById('text').focus()")
    browser.send("Input.insertText", text=text)
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)


def answered(browser: Browser, answers: int = 1) -> list[list[str]]:
    """Wait for so many answers, and return the class and the text of every message."""
    until(browser, f"document.querySelectorAll('.note').length >= {answers}")
    script = "JSON.stringify([...document.querySelectorAll('article')].map(a => [a.className, a.textContent]))"
    found: list[list[str]] = json.loads(browser.value(script))
    return found


def greedy(browser: Browser) -> None:
    """Let the page ask for a greedy text of twelve tokens."""
    until(browser, "document.getElementById('model').options.length > 0")
    browser.value("document.getElementById('temperature').value = '0'; document.getElementById('most').value = '12'")


def complaints(browser: Browser) -> list[dict[str, Any]]:
    return [event for event in browser.events if event.get("method") in COMPLAINTS]


@pages
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_conversation(
    size: tuple[int, int], dark: bool, browser: Browser, server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    """Two turns, of which the second has the first before it, on the page's own server and nowhere else."""
    browser.open(f"{server.url}/", size, dark)
    greedy(browser)
    assert browser.value("[...document.getElementById('model').options].map(o => o.value).join()") == "tiny,again"
    assert browser.value("document.getElementById('access').hidden") is True
    ask(browser, "import os")
    first = answered(browser)
    ask(browser, HOSTILE)
    found = answered(browser, 2)
    talk = [user("import os")]
    for question in ("", HOSTILE):
        talk += [user(question)] if question else []
        answer = client.chat.completions.create(model="tiny", messages=talk, temperature=0, max_tokens=12)
        talk.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert found == [[message["role"], message["content"]] for message in talk]
    assert first == found[:2]
    assert browser.value("window.hit === undefined && document.getElementById('bold') === null") is True
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    assert complaints(browser) == []
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    paths = ["", "chat.css", "chat.js", "v1/models", "v1/chat/completions", "v1/chat/completions"]
    assert asked == [f"{server.url}/{path}" for path in paths]
    colours = browser.value("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color")
    assert colours == ("rgb(18, 23, 29)rgb(228, 233, 240)" if dark else "rgb(255, 255, 255)rgb(29, 39, 51)")
    kept = Path(os.environ.get("H1EXPORT_SCREENSHOTS") or tmp_path)
    picture = kept / f"chat-{size[0]}-{'dark' if dark else 'light'}.png"
    picture.write_bytes(base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"]))
    assert picture.stat().st_size > 5_000


@pages
def test_what_a_model_writes_is_no_markup(browser: Browser, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        """A decoder whose tokens are the letters of a hostile text."""

        def __init__(self, *_: object, **__: object) -> None:
            self._letters = iter([HOSTILE[:20], HOSTILE[20:], *[""] * 20])

        def step(self, token: int) -> str:
            return next(self._letters)

        def rest(self) -> str:
            return ""

    monkeypatch.setattr("h1export.serve.model.TokenDecoder", Hostile)
    browser.open(f"{server.url}/")
    greedy(browser)
    ask(browser, "x")
    assert answered(browser) == [["user", "x"], ["assistant", HOSTILE]]
    assert browser.value("document.querySelectorAll('article *').length") == 0
    assert browser.value("window.hit === undefined") is True
    assert complaints(browser) == []


@pages
def test_errors_and_a_stop(browser: Browser, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is shown as text and its message can be sent again; a stopped text stays in the conversation."""
    browser.open(f"{server.url}/")
    greedy(browser)
    browser.value("document.getElementById('most').value = '-3'")
    ask(browser, "import os")
    until(browser, "!document.getElementById('problem').hidden")
    assert browser.value("document.getElementById('problem').textContent") == "Expected `int` >= 0"
    assert browser.value("document.getElementById('text').value") == "import os"
    assert browser.value("document.querySelectorAll('article').length") == 0
    browser.value("document.getElementById('most').value = '3000'; document.getElementById('text').value = ''")
    browser.value("document.getElementById('temperature').value = '2'")
    ask(browser, "import os")
    until(browser, "document.querySelector('.assistant')?.textContent.length > 20")
    browser.value("document.getElementById('stop').click()")
    found = answered(browser)
    assert "stopped" in browser.value("document.querySelector('.note').textContent")
    assert [role for role, _ in found] == ["user", "assistant"]
    until(browser, "!document.getElementById('send').hidden")
    browser.value("document.getElementById('clear').click()")
    assert browser.value("document.getElementById('log').childNodes.length") == 0


@contextmanager
def guarded(server: Server, keys: Path) -> Iterator[str]:
    """The address of the same models behind keys."""
    app = Api(server.models, Metrics(), ApiKeys.read(keys), report=lambda _: None).application()
    made = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = Thread(target=made.run)
    thread.start()
    while not made.started:
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{made.servers[0].sockets[0].getsockname()[1]}"
    finally:
        made.should_exit = True
        thread.join()


@pages
def test_a_key_is_asked_for_where_the_server_wants_one(browser: Browser, server: Server, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key-1\n")
    with guarded(server, tmp_path / "keys") as url:
        browser.open(f"{url}/")
        until(browser, "!document.getElementById('access').hidden")
        for key in ("wrong-key-1", "first-key-1"):
            browser.value("document.getElementById('key').focus()")
            browser.send("Input.insertText", text=key)
            browser.value("document.getElementById('access').requestSubmit()")
            until(browser, "document.getElementById('key').value === ''")
            shown = "problem" if key.startswith("wrong") else "access"
            until(browser, f"document.getElementById('{shown}').hidden === {str(shown == 'access').lower()}")
        greedy(browser)
        ask(browser, "import os")
        assert [role for role, _ in answered(browser)] == ["user", "assistant"]
        assert browser.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_the_page_comes_without_a_key_and_with_a_policy(server: Server, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key-1\n")
    app = Api(server.models, Metrics(), ApiKeys.read(tmp_path / "keys"), report=lambda _: None).application()

    async def answers() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as client:
            return [await client.get(path) for path in ("/", "/chat.css", "/chat.js", "/v1/models")]

    *page, models = asyncio.run(answers())
    assert [answer.status_code for answer in (*page, models)] == [200, 200, 200, 401]
    assert [answer.headers["Content-Type"].partition(";")[0] for answer in page] == [
        "text/html",
        "text/css",
        "text/javascript",
    ]
    for answer in page:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for markup in ("innerHTML", "insertAdjacent", "document.write", "http:", "https:"):
            assert markup not in answer.text
