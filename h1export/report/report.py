"""The report of a validation: rows of figures and tolerances, each with a verdict, as report.json stores them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeVar

from h1export.errors import H1ExportError, reason
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.histogram import Histogram

# names of histograms: both count positions of a text or case
LOGIT_ERROR = "logit error"
KL = "kl"
# figures that must not fall below their tolerance; all others must not exceed it
AT_LEAST = frozenset({"top1", "top5"})
# figures of a CONTEXT_COST: milliseconds of a token
PREFILL_MS = "prefill_ms"
DECODE_MS = "decode_ms"
OUTPUT_FIGURES = ("logits", "states", "kl", "top1")  # of every row that compares logits and states
OUTPUT_KINDS = frozenset({CheckKind.CASE, CheckKind.CONTEXT})  # the kinds of those rows
NOT_FINITE = frozenset({"nan", "inf", "-inf"})  # strings in report.json: JSON has no such numbers
AGAIN = "run `h1export validate` again"

E = TypeVar("E", bound=StrEnum)


class Verdict(StrEnum):
    """The result of a check; only FAIL fails a report. INCONCLUSIVE: the measurement is too noisy to decide."""

    PASS = "pass"
    FAIL = "FAIL"
    INCONCLUSIVE = "inconclusive"
    INFO = "info"
    NOT_APPLICABLE = "n/a"


def within(figure: str, value: float, tolerance: float) -> bool:
    """Return whether a figure is within its tolerance. NaN never is."""
    return value >= tolerance if figure in AT_LEAST else value <= tolerance


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        kind: what was run.
        comparison: which run was compared with which weights.
        case: the name of the case, of a CASE.
        phase: the phase of inference, of a BISECT or a LATENCY.
        length: tokens, of a CASE, a CONTEXT or a CONTEXT_COST.
        device: the processor that the check ran on, in a report that covers several.
        figures: name -> value.
        tolerances: name -> tolerance, for some or all of the figures.
        note: one line for the reader; the reason where there are no figures.
        details: figures too many for a table, by name.
        histograms: how values behind the figures are spread, by name.
    """

    kind: CheckKind
    comparison: Comparison
    _: KW_ONLY
    case: str = ""
    phase: Phase | None = None
    length: int | None = None
    device: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    @property
    def compares_outputs(self) -> bool:
        """Whether the row has the OUTPUT_FIGURES."""
        return self.kind in OUTPUT_KINDS and self.figures.keys() >= set(OUTPUT_FIGURES)

    @property
    def verdict(self) -> Verdict:
        """FAIL for any figure beyond its tolerance or not a number; INFO where nothing has a tolerance."""
        if not self.figures:
            return Verdict.NOT_APPLICABLE
        judged = [self.keeps(name) for name in self.tolerances]
        if not all(judged) or any(math.isnan(value) for value in self.figures.values()):
            return Verdict.FAIL
        return Verdict.PASS if judged else Verdict.INFO

    def keeps(self, figure: str) -> bool:
        """Return whether this figure is within its tolerance, or has none."""
        return figure not in self.tolerances or within(figure, self.figures[figure], self.tolerances[figure])


@dataclass(frozen=True)
class Report:
    """All rows of one validation.

    Attributes:
        subject: facts of the artifact or Runner that was validated.
        environment: facts of the machine, and the versions of packages.
        rows: the checks.
    """

    subject: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.verdict is not Verdict.FAIL for row in self.rows)

    def to_json(self) -> str:
        """Return the text of report.json.

        ``passed`` and each row's ``verdict`` are for readers; ``from_json`` derives them again.
        """
        rows = [{**asdict(row), "verdict": row.verdict} for row in self.rows]
        data = {"passed": self.passed, "subject": self.subject, "environment": self.environment, "rows": rows}
        return json.dumps(_spelled(data), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object) -> Report:
        """Return the report that ``to_json`` wrote as ``text``; ``where`` names the file in messages.

        Raises:
            H1ExportError: not JSON, or of another form than ``to_json`` writes.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise H1ExportError(where, f"is not JSON ({reason(error)})", AGAIN) from None
        try:
            table = _table(data, REPORT_KEYS)
            if not isinstance(table["rows"], list):
                raise ValueError("rows is no list")
            rows = tuple(_row(row) for row in table["rows"])
            return cls(_table(table["subject"]), _table(table["environment"]), rows)
        except ValueError as error:
            raise H1ExportError(where, f"has another form than this h1export writes: {reason(error)}", AGAIN) from None


REPORT_KEYS = frozenset(field.name for field in fields(Report)) | {"passed"}
ROW_KEYS = frozenset(field.name for field in fields(Row)) | {"verdict"}
HISTOGRAM_KEYS = frozenset(field.name for field in fields(Histogram))


def _spelled(value: Any) -> Any:
    """Return ``value`` with a string for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _table(value: Any, keys: frozenset[str] | None = None) -> dict[str, Any]:
    """Return a JSON object after a check that it is one, with exactly ``keys`` where they are given."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no object")
    if keys is not None and value.keys() != keys:
        raise ValueError(f"its keys are {', '.join(value)}, expected {', '.join(sorted(keys))}")
    return value


def _row(value: Any) -> Row:
    table = _table(value, ROW_KEYS)
    return Row(
        _member(CheckKind, table["kind"]),
        _member(Comparison, table["comparison"]),
        case=_text(table["case"]),
        phase=None if table["phase"] is None else _member(Phase, table["phase"]),
        length=None if table["length"] is None else _count(table["length"]),
        device=_text(table["device"]),
        figures=_numbers(table["figures"]),
        tolerances=_numbers(table["tolerances"]),
        note=_text(table["note"]),
        details=_numbers(table["details"]),
        histograms={name: _histogram(one) for name, one in _table(table["histograms"]).items()},
    )


def _member(kinds: type[E], value: Any) -> E:
    return kinds(_text(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r:.40} is no whole number")
    return value


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(item) for name, item in _table(value).items()}


def _number(value: Any) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{value!r:.40} is no number")
    return value


def _histogram(value: Any) -> Histogram:
    table = _table(value, HISTOGRAM_KEYS)
    if not isinstance(table["counts"], list):
        raise ValueError("the counts of a histogram are no list")
    return Histogram(_count(table["first"]), tuple(_count(count) for count in table["counts"]))
