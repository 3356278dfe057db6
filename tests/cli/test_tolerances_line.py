"""The line of tolerances under the table of cases."""

from __future__ import annotations

from h1export.cli.tables import _tolerances
from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Row


def test_a_tolerance_that_depends_on_the_case_is_shown_as_a_span() -> None:
    """Each metric stands there once."""
    cases: list[dict[str, float]] = [{"logits": 0.08}, {"logits": 0.08, "top1": 0.25}, {"logits": 0.08, "top1": 0.678}]
    rows = [Row(CheckKind.CASE, Comparison.DRIFT, figures=dict.fromkeys(case, 1.0), tolerances=case) for case in cases]
    assert _tolerances(rows) == "tolerances  drift.logits 0.08  drift.top1 0.25 to 0.678"
