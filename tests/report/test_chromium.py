"""report.html in headless Chromium, by its DevTools protocol: it renders, logs nothing, fits, and requests nothing."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from h1export.report.page import page

pytestmark = pytest.mark.chromium
NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = (390, 844)
DESKTOP = (1280, 900)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)
LOAD_SECONDS = 60.0


class Browser:
    """Chromium reads messages from its file descriptor 3 and writes them to 4, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program is not None, f"no browser: none of {', '.join(NAMES)}; on Debian, apt-get install chromium"
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        wired = [
            "bash",
            "-c",
            f'exec "$@" 3<&{to_read} 4>&{to_write}',
            "bash",
            program,
            *FLAGS,
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            wired, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._last = 0
        self.events = list[dict[str, Any]]()
        self.session: str | None = None

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events on the way are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self._last:
                assert "error" not in found, (method, found)
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def wait(self, event: str) -> None:
        while all(found.get("method") != event for found in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, file: Path, size: tuple[int, int], dark: bool) -> None:
        """A tab of this ``size`` that has loaded ``file``."""
        self.session = None
        self.events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        phone = size == PHONE
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send("Page.navigate", url=file.as_uri())
        self.wait("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(LOAD_SECONDS)
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def folders(judged: Callable[..., Path]) -> list[Path]:
    """A right artifact, and a wrong one whose long name and texts would like to be more."""
    hostile = "<script>alert(1)</script><img src=http://example.com/a.png>" + "a_very_long_name_without_spaces" * 5
    return [judged("falcon-int4"), judged("falcon-int4-broken-" + "x" * 60, size=3.0, hostile=hostile)]


@pytest.fixture(scope="module")
def file(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(page(folders), encoding="utf-8")
    return place


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_renders(
    size: tuple[int, int], dark: bool, browser: Browser, file: Path, folders: list[Path], tmp_path: Path
) -> None:
    browser.open(file, size, dark)
    complaints = [
        e
        for e in browser.events
        if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    assert complaints == []
    request = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert request == [file.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    charts = json.loads(
        browser.value(
            "JSON.stringify([...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect()))"
        )
    )
    assert len(charts) == 15
    assert all(chart["width"] > 240 and chart["height"] > 150 for chart in charts)
    colours = browser.value("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color")
    assert colours == ("rgb(18, 23, 29)rgb(228, 233, 240)" if dark else "rgb(255, 255, 255)rgb(29, 39, 51)")
    line = browser.value("getComputedStyle(document.querySelector('svg path[style*=\"--series-0\"]')).stroke")
    assert line == ("rgb(111, 168, 245)" if dark else "rgb(37, 99, 184)")
    kept = Path(os.environ.get("H1EXPORT_SCREENSHOTS") or tmp_path)
    shot = browser.send("Page.captureScreenshot", captureBeyondViewport=True, format="png")
    picture = kept / f"report-{size[0]}-{'dark' if dark else 'light'}.png"
    picture.write_bytes(base64.b64decode(shot["data"]))
    assert picture.stat().st_size > 20_000


def test_the_browser_sees_the_numbers_of_report_json(browser: Browser, file: Path, folders: list[Path]) -> None:
    browser.open(file, DESKTOP, dark=False)
    script = """JSON.stringify([...document.querySelectorAll('[data-figure]')].map(e => [
        e.closest('tr').dataset.row, e.dataset.figure,
        e.querySelector('data').value, e.querySelector('data').textContent]))"""
    found = {(row, name): (value, shown) for row, name, value, shown in json.loads(browser.value(script))}
    truth = {
        (f"{subject}/{index}", name): value
        for subject, folder in enumerate(folders)
        for index, row in enumerate(json.loads((folder / "report.json").read_text())["rows"])
        for name, value in row["figures"].items()
    }
    assert found.keys() == truth.keys()
    for place, (value, shown) in found.items():
        assert float(value) == float(truth[place])
        assert float(shown) == pytest.approx(float(truth[place]), rel=1e-3)
