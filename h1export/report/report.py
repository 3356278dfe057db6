"""Report: what a validation found, row by row, each row with a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from h1export.report.histogram import Histogram

# histograms: of positions
LOGIT_ERROR = "logit error"
KL = "kl"
AT_LEAST = frozenset({"top1", "top5"})  # figures that must not fall below their limit; all others must not exceed it


class Verdict(StrEnum):
    """What a row amounts to; only FAIL fails a report. INCONCLUSIVE: measured, and not well enough to say."""

    PASS = "pass"
    FAIL = "FAIL"
    INCONCLUSIVE = "inconclusive"
    INFO = "info"
    NOT_APPLICABLE = "n/a"


def within(figure: str, value: float, limit: float) -> bool:
    """Whether a figure keeps its limit. NaN never does."""
    return value >= limit if figure in AT_LEAST else value <= limit


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: what was run.
        against: the group of metrics it belongs to: which run was compared with which weights.
        figures: name -> value.
        limits: name -> limit, for some or all of the figures.
        note: one line for the reader; the reason where there are no figures.
        details: figures too many for a table, by name.
        histograms: how values behind the figures are spread, by name.
    """

    check: str
    against: str
    figures: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """FAIL for any figure beyond its limit or not a number; INFO where nothing has a limit."""
        if not self.figures:
            return Verdict.NOT_APPLICABLE
        judged = [within(name, self.figures[name], limit) for name, limit in self.limits.items()]
        if not all(judged) or any(math.isnan(value) for value in self.figures.values()):
            return Verdict.FAIL
        return Verdict.PASS if judged else Verdict.INFO


@dataclass(frozen=True)
class Report:
    """All rows of one validation, and what they were measured on."""

    subject: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.verdict is not Verdict.FAIL for row in self.rows)

    def to_json(self) -> str:
        rows = [{**asdict(row), "verdict": row.verdict} for row in self.rows]
        data = {"passed": self.passed, "subject": self.subject, "environment": self.environment, "rows": rows}
        return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
