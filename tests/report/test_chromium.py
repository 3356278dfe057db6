"""report.html in headless Chromium, by its DevTools protocol: it renders, logs nothing, fits, and requests nothing."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import DESKTOP, PHONE, Browser

from h1export.report.page import page

pytestmark = pytest.mark.chromium


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
    browser.open(file.as_uri(), size, dark)
    complaints = [
        e
        for e in browser.events
        if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    assert complaints == []
    assert browser.requests() == [file.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    charts = json.loads(
        browser.value(
            "JSON.stringify([...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect()))"
        )
    )
    assert len(charts) == 17
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
    browser.open(file.as_uri(), DESKTOP, dark=False)
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
