"""The names of rows for readers. Only modules that print import this one, because programs find rows by their kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Row

CHECKS: Mapping[CheckKind, Callable[[Row], str]] = {
    CheckKind.CASE: lambda row: row.case,
    CheckKind.CONTEXT: lambda row: f"context {row.length}",
    CheckKind.CONTEXT_COST: lambda row: "cost by context" if row.length is None else f"cost at {row.length}",
    CheckKind.BISECT: lambda row: f"bisect {row.phase}" if row.phase else "bisect",
    CheckKind.BISECT_INTEGERS: lambda row: "bisect integers",
    CheckKind.STORED_INTEGERS: lambda row: "stored integers",
    CheckKind.TEXT: lambda row: "bits per byte",
    CheckKind.COST: lambda row: f"what {row.case} costs",
    CheckKind.GREEDY_TEXT: lambda row: "greedy text",
    CheckKind.LATENCY: lambda row: f"{row.phase} latency" if row.phase else "latency",
    CheckKind.SPEED: lambda row: f"{row.phase} speed at {row.length}" if row.phase else "speed",
    CheckKind.SHARED_INTEGERS: lambda row: "shared integers",
    CheckKind.FP16_RANGE: lambda row: "fp16 range",
    CheckKind.PUBLISHED: lambda row: "published",
    CheckKind.LOADING: lambda row: "loading",
}
COMPARISONS: Mapping[Comparison, str] = {
    Comparison.SOURCE: "source",
    Comparison.STORED: "stored",
    Comparison.DRIFT: "drift",
    Comparison.FP16_LIMIT: "65504",
    Comparison.GOLDEN: "golden",
    Comparison.ALONE: "alone",
}


def check_label(row: Row) -> str:
    """Return the name of the check of a row, as tables show it."""
    text = CHECKS[row.kind](row)
    return f"{text}, {row.device}" if row.device else text


def comparison_label(row: Row) -> str:
    """Return the name of the comparison of a row, as tables show it."""
    return COMPARISONS[row.comparison]
