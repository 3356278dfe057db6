"""The row of what integers cost: its figures, its verdict, and when a text is too short for one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.report.checks import CheckKind, Comparison
from h1export.report.labels import check_label
from h1export.report.report import Row, Verdict
from h1export.validate.accuracy.cost import LEAST_WINDOWS, SIGMAS, WIDEST, cost_row, too_short
from h1export.validate.accuracy.perplexity import WINDOW

ENOUGH = LEAST_WINDOWS * WINDOW + 1
TOLERANCES = {"source.kl": 0.3}


def text_row(kl: float, error: float) -> Row:
    figures = {"kl": kl, "kl_p99": 9 * kl, "top1": 0.9, "ratio": 1.01, "artifact": 1.4, "reference": 1.38}
    errors = {f"{name}_se": error for name in figures}
    return Row(CheckKind.TEXT, Comparison.SOURCE, figures=figures | errors, note="9000 bytes, 5000 tokens")


GREEDY = Row(CheckKind.GREEDY_TEXT, Comparison.SOURCE, figures={"tokens": 21.5, "never": 0.25})


@pytest.mark.parametrize(("kl", "verdict"), [(0.01, Verdict.PASS), (0.4, Verdict.FAIL)])
def test_a_long_text_gets_a_verdict(kl: float, verdict: Verdict) -> None:
    row = cost_row("int4", text_row(kl, kl / 20), GREEDY, tokens=ENOUGH, tolerances=TOLERANCES)
    assert check_label(row) == "what int4 costs"
    assert row.verdict is verdict
    assert {name: row.figures[name] for name in ("kl", "kl_p99", "top1", "greedy")} == {
        "kl": kl,
        "kl_p99": 9 * kl,
        "top1": 0.9,
        "greedy": 21.5,
    }
    assert row.note == "9000 bytes, 5000 tokens"


@pytest.mark.parametrize(
    ("tokens", "error"),
    [(ENOUGH - 1, 0.01), (2, 0.0), (ENOUGH, 0.2), (10 * ENOUGH, math.nextafter(WIDEST / SIGMAS, 1))],
)
def test_a_short_text_gets_none_and_says_what_would_do(tokens: int, error: float) -> None:
    row = cost_row("int8", text_row(0.4, 0.4 * error), GREEDY, tokens=tokens, tolerances=TOLERANCES)
    assert row.verdict is Verdict.INFO  # although 0.4 is beyond the tolerance
    assert "too short for a verdict" in row.note
    assert "tokens would do" in row.note


@given(st.integers(2, 10**6), st.floats(1e-9, 10), st.floats(0, 10))
@settings(deadline=None, derandomize=True)
def test_what_would_do_does(tokens: int, kl: float, share: float) -> None:
    """A text as long as the note says has an interval that is narrow enough, as errors fall with the square root."""
    said = too_short(tokens, kl, kl * share)
    if not said:
        assert tokens >= ENOUGH
        assert SIGMAS * share <= WIDEST * (1 + 1e-9)
        return
    wanted = int(said.rsplit("about ", 1)[1].split(" ")[0])
    assert wanted > tokens or tokens < ENOUGH
    narrower = kl * share * math.sqrt(tokens / wanted) * (1 - 1e-9)
    assert not too_short(wanted, kl, narrower)


def test_no_text_has_no_figures() -> None:
    row = cost_row(
        "int4", Row(CheckKind.TEXT, Comparison.SOURCE, note="not requested"), GREEDY, tokens=0, tolerances={}
    )
    assert row.verdict is Verdict.NOT_APPLICABLE
    assert row.note == "not requested"


def test_equal_predictions_cost_nothing_and_broken_ones_fail() -> None:
    assert cost_row("int8", text_row(0.0, 0.0), GREEDY, tokens=ENOUGH, tolerances=TOLERANCES).verdict is Verdict.PASS
    broken = cost_row("int8", text_row(math.nan, math.nan), GREEDY, tokens=ENOUGH, tolerances=TOLERANCES)
    assert broken.verdict is Verdict.FAIL
