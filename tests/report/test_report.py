"""Reports survive a round trip through JSON, and a file of another form is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.histogram import Histogram
from h1export.report.report import OUTPUT_FIGURES, Report, Row, Verdict

NAMES = st.text(max_size=8)
NUMBERS = st.dictionaries(NAMES, st.floats() | st.integers(-(2**60), 2**60), max_size=4)
HISTOGRAMS = st.builds(Histogram, st.integers(-48, 20), st.lists(st.integers(0, 9), max_size=4).map(tuple))
ROWS = st.builds(
    Row,
    st.sampled_from(CheckKind),
    st.sampled_from(Comparison),
    case=NAMES,
    phase=st.none() | st.sampled_from(Phase),
    length=st.none() | st.integers(0, 2**40),
    device=NAMES,
    figures=NUMBERS,
    note=NAMES,
    details=NUMBERS,
    histograms=st.dictionaries(NAMES, HISTOGRAMS, max_size=2),
)
FACTS = st.dictionaries(NAMES, st.none() | st.booleans() | st.integers() | NAMES | st.lists(NAMES), max_size=3)
ROW = Row(CheckKind.CONTEXT, Comparison.STORED, length=64, figures={"kl": math.nan}, tolerances={"kl": math.inf})


def same(a: Any, b: Any) -> bool:
    """Equality in which NaN equals NaN."""
    return repr(a) == repr(b)


@settings(deadline=None, derandomize=True)
@given(FACTS, FACTS, st.lists(ROWS, max_size=4), NUMBERS, st.floats())
def test_a_report_comes_back_from_json(
    subject: dict[str, Any], environment: dict[str, Any], rows: list[Row], figures: dict[str, float], tolerance: float
) -> None:
    judged = Row(CheckKind.TEXT, Comparison.SOURCE, figures=figures, tolerances=dict.fromkeys(figures, tolerance))
    report = Report(subject, environment, (*rows, judged))
    text = report.to_json()
    found = Report.from_json(text, "report.json")
    assert same(found, report)
    assert found.to_json() == text
    assert found.passed is report.passed is json.loads(text)["passed"]


def test_what_is_not_finite_is_text_in_json_and_a_number_in_python() -> None:
    text = Report({}, {}, (ROW,)).to_json()
    (row,) = json.loads(text)["rows"]
    assert row["figures"] == {"kl": "nan"}
    assert row["tolerances"] == {"kl": "inf"}
    (found,) = Report.from_json(text, "report.json").rows
    assert math.isnan(found.figures["kl"])
    assert found.tolerances == {"kl": math.inf}
    assert found.verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "context 64"),
        ("comparison", "somewhere"),
        ("phase", "warm-up"),
        ("length", "64"),
        ("length", True),
        ("case", None),
        ("figures", {"kl": "small"}),
        ("figures", {"kl": True}),
        ("figures", []),
        ("histograms", {"kl": {"first": 0}}),
        ("histograms", {"kl": {"first": 0, "counts": 3}}),
        ("check", "context 64"),
    ],
)
def test_a_row_of_another_form_is_refused(name: str, value: Any) -> None:
    data = json.loads(Report({}, {}, (ROW,)).to_json())
    data["rows"][0][name] = value
    with pytest.raises(H1ExportError, match=r"out: is not a report of this h1export \(.*validate` again"):
        Report.from_json(json.dumps(data), "out")


@pytest.mark.parametrize("name", ["subject", "environment", "rows", "passed"])
def test_a_report_without_a_part_is_refused(name: str) -> None:
    data = json.loads(Report({}, {}, (ROW,)).to_json())
    del data[name]
    with pytest.raises(H1ExportError, match=f"missing required field `{name}`"):
        Report.from_json(json.dumps(data), "out")


def test_outputs_are_rows_with_their_figures() -> None:
    figures = dict.fromkeys(OUTPUT_FIGURES, 0.0)
    assert Row(CheckKind.CASE, Comparison.STORED, figures=figures).compares_outputs
    assert Row(CheckKind.CONTEXT, Comparison.STORED, figures=figures).compares_outputs
    assert not Row(CheckKind.TEXT, Comparison.SOURCE, figures=figures).compares_outputs
    assert not Row(CheckKind.CASE, Comparison.STORED, note="not run").compares_outputs
