"""Cells of a sweep: their files, which of them no other one beats, and their page."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.report.sweep_page import sweep_page
from h1export.report.swept import DECODE, KL, Swept, fronts, staircase


def cell(name: str = "a", size: int = 1, kl: float | None = 0.1, speed: float | None = None, **others: Any) -> Swept:
    figures = {key: value for key, value in ((KL, kl), (DECODE, speed)) if value is not None}
    known = {"checkpoint": "m", "target": "ort", "precision": "int4", "passed": True, **others}
    return Swept(name, "0" * 64, nbytes=size, figures=figures, **known)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for figures in ({}, {KL: 0.5}, {KL: math.inf, "x": -math.inf}):
        one = replace(cell(error="e", note="n", tasks={"t acc": 0.25}), figures=figures)
        one.write(tmp_path)
        assert Swept.read(tmp_path / "a.json") == one
    replace(cell(), figures={KL: math.nan}).write(tmp_path)
    assert math.isnan(Swept.read(tmp_path / "a.json").figures[KL])
    (tmp_path / "a.json").write_text('{"name": "a"}')
    with pytest.raises(H1ExportError, match="is not a cell's file"):
        Swept.read(tmp_path / "a.json")


def test_what_no_other_one_beats() -> None:
    cells = [
        cell("small", 1, 0.5, 10),
        cell("right", 9, 0.1, 10),
        cell("fast", 9, 0.5, 99),
        cell("worse", 9, 0.5, 10),
        cell("same", 1, 0.5, 10),
        cell("other", 99, 0.9, 1, checkpoint="n"),
        cell("failed", 1, 0.0, 999, passed=False),
        cell("broken", 1, 0.0, 999, error="x"),
        cell("silent", 1, None, 10),
        cell("nan", 1, math.nan, 10),
    ]
    assert fronts(cells) == {"small", "right", "fast", "same", "other"}
    assert fronts([cell("a", 1, None), cell("b", 2, None)]) == {"a"}
    assert fronts([]) == set()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([0.1, 0.2, None]), st.sampled_from([1.0, 2.0, None])), max_size=6
    )
)
def test_every_cell_is_on_the_front_or_beaten_by_one_that_is(values: list[tuple[int, Any, Any]]) -> None:
    cells = [cell(str(place), *value) for place, value in enumerate(values)]
    best = fronts(cells)

    def costs(one: Swept) -> tuple[float, ...]:
        return one.nbytes, one.figures.get(KL, math.inf), -one.figures.get(DECODE, -math.inf)

    for one in cells:
        better = [
            other
            for other in cells
            if all(a <= b for a, b in zip(costs(other), costs(one), strict=True)) and costs(other) != costs(one)
        ]
        assert (one.name in best) == (not better)
        assert one.name in best or any(other.name in best for other in better)


def test_steps() -> None:
    assert list(staircase([(3, 1), (1, 5), (2, 7), (2, 2), (4, 1)])) == [(1, 5), (2, 2), (3, 1)]


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags = list[str]()
        self.cells = list[str]()
        self.values = list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.cells += [str(found["data-cell"])] if "data-cell" in found else []
        self.values += [str(found["value"])] if tag == "data" else []


@pytest.mark.ort
def test_the_page_has_every_number_and_no_markup_of_others() -> None:
    hostile = "<script>alert(1)</script><img src=x>$x$"
    cells = [
        cell("a", 100, 0.25, 12.5, tasks={f"task {hostile}": 0.125}, note=hostile),
        cell("b", 200, 0.0, 25.0, target=hostile),
        cell("c", 0, None, None, error=hostile, checkpoint=hostile, passed=False),
    ]
    text = sweep_page(cells)
    seen = Seen()
    seen.feed(text)
    assert seen.cells == ["a", "b", "c"]
    assert {"0.25", "12.5", "0.125", "100", "25.0", "0.0"} <= set(seen.values)
    assert seen.tags.count("svg") == 2  # of the checkpoint that has figures
    assert {"script", "img"}.isdisjoint(seen.tags)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert 'class="front"' in text
