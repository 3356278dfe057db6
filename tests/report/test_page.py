"""report.html as text: one file, no scripts, every number that of report.json, whatever a name or a note holds."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.report import charts
from h1export.report.histogram import Histogram
from h1export.report.page import page
from h1export.report.stored_report import OTHERS, JudgedArtifact

pytestmark = pytest.mark.ort
Judge = Callable[..., Path]
HOSTILE = (
    "<script>alert(1)</script> & \"quote\" '$x^2$' </svg><img src=http://example.com/a.png onerror=alert(2)> {{ 7*7 }}"
)
OPEN = {"meta", "link", "img", "br", "path", "use", "rect", "input"}  # need no end


class Page(HTMLParser):
    """The elements of a page, and the figures of its rows: (row, figure) -> the values of the numbers beside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[tuple[str, str], list[str]] = {}
        self.shown: dict[tuple[str, str], list[str]] = {}
        self.stack: list[str] = []
        self._place = ("", "")
        self._row = ""
        self._number = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in OPEN:
            self.stack.append(tag)
        if "data-row" in found:
            self._row = str(found["data-row"])
        if "data-figure" in found:
            self._place = (self._row, str(found["data-figure"]))
        if tag == "data" and self._place[1]:
            self.figures.setdefault(self._place, []).append(str(found["value"]))
            self._number = True

    def handle_data(self, data: str) -> None:
        if self._number:
            self.shown.setdefault(self._place, []).append(data)
            self._number = False

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN:
            assert self.stack.pop() == tag
        if tag == "tr":
            self._place = ("", "")


def test_the_numbers_are_those_of_report_json(judged: Judge) -> None:
    folders = [judged("right"), judged("wrong", size=3.0)]
    found = Page(page(folders))
    assert not found.stack
    for subject, folder in enumerate(folders):
        rows = json.loads((folder / "report.json").read_text())["rows"]
        for index, row in enumerate(rows):
            for name, value in row["figures"].items():
                truth = [value, row["tolerances"][name]] if name in row["tolerances"] else [value]
                place = (f"{subject}/{index}", name)
                assert [text if text in ("inf", "nan") else json.loads(text) for text in found.figures[place]] == truth
                assert [float(text) for text in found.shown[place]] == pytest.approx(
                    [float(value) for value in truth], rel=1e-3
                )
    assert len(found.figures) == sum(
        len(row["figures"]) for f in folders for row in json.loads((f / "report.json").read_text())["rows"]
    )


def test_verdicts_are_on_top_and_charts_for_everything(judged: Judge) -> None:
    text = page([judged("right"), judged("wrong", size=3.0)])
    assert text.index("PASSED") < text.index("FAILED") < text.index("<main>") < text.index("Every check")
    titles = set(re.findall(r'aria-label="([^"]*)"', text))
    assert titles == {
        "Logits, lowering alone",
        "Logits, rounded activations",
        "Logits on the text, against the full model",
        "KL divergence on the text",
        "Bits by layer",
        "Mean KL",
        "Residual stream",
        *(f"State: {kind}" for kind in ("key", "value", "conv_state", "recurrent_state")),
        "Worst state",
        "Logits of the last positions",
        "Cost of a token, prefill",
        "Cost of a token, decode",
        "Megabytes",
        "Bits a weight",
    }


def test_one_file_without_network_or_scripts(judged: Judge) -> None:
    found = Page(page([judged("right")]))
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert str(value).startswith("#"), (tag, name, value)
    assert all("url(" not in str(a.get("style")) or "url(#" in str(a["style"]) for _, a in found.elements)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_hostile_texts_stay_texts(judged: Judge) -> None:
    name = "<b onclick=alert(3)>$a_$&\"'"
    text = page([judged(name, hostile=HOSTILE)])
    found = Page(text)
    plain = Page(page([judged("plain", hostile="harmless")]))
    assert [tag for tag, _ in found.elements if tag not in ("li", "ul")] == [
        tag for tag, _ in plain.elements if tag not in ("li", "ul")
    ]
    assert "alert(1)" in text
    assert "{{ 7*7 }}" in text
    assert "<script" not in text


def test_sizes_are_those_of_the_manifest(judged: Judge) -> None:
    folder = judged("right")
    subject = JudgedArtifact.open(folder)
    artifact = Artifact.open(folder)
    parts = {part["kind"]: part for part in subject.parts}
    assert sum(part["nbytes"] for part in parts.values()) == sum(size for _, size in artifact.manifest.files.values())
    assert sum(part["weights"] for part in parts.values()) == sum(
        np.prod(shape) for shape in tensor_shapes(artifact.config).values()
    )
    assert parts["mamba"]["bits"] == 4.5  # 4, and a scale of 16 for 32
    assert parts["embedding"]["bits"] == pytest.approx(8 + 16 / 128)  # untied: int8, a scale for a row of 128
    assert parts[OTHERS]["bits"] is None


def test_a_chart_draws_its_values() -> None:
    """The line's points, in the drawing's own units, lie as the values do."""
    svg = charts.lines("name", "x", "y", series=[charts.Series(0, [0, 1, 2], [1e-6, 1e-4, 1e-5])])
    root = ElementTree.fromstring(svg.replace("xlink:", "").replace("xmlns:xlink", "xmlns-xlink"))
    (line,) = [
        e
        for e in root.iter()
        if e.tag.endswith("path") and "--series-0" in e.get("style", "") and e.get("d", "").count("L") == 2
    ]
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line.get("d", "")), float)
    assert points[1, 0] - points[0, 0] == pytest.approx(points[2, 0] - points[1, 0], rel=1e-4)
    assert (points[0, 1] - points[1, 1]) == pytest.approx(
        2 * (points[0, 1] - points[2, 1]), rel=1e-4
    )  # two decades, and one
    assert "#a1b2" not in svg
    bars = charts.histograms("name", "x", {1: Histogram(-4, (1, 3))})
    assert "--series-1" in bars


def test_the_command(
    judged: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = judged("one")
    other = judged("other")
    assert run(["report", str(one)]) == 0
    assert (one / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    Artifact.open(one).check_hashes()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(["report", str(one), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": "report.html"}
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("report", "said"),
    [(None, "has no report.json"), ("{", "not JSON at line 1"), ('{"passed": true}', "missing"), ("[]", "got `array`")],
)
def test_what_is_no_report_is_refused(
    report: str | None, said: str, judged: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Any = judged("damaged")
    (folder / "report.json").unlink()
    if report is not None:
        (folder / "report.json").write_text(report)
    assert run(["report", str(folder)]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_without_matplotlib_it_says_what_to_install(judged: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(H1ExportError, match=r"pip install 'h1export\[report\]'"):
        page([judged("right")])
