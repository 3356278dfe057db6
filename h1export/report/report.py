"""The report of a validation: rows of figures and tolerances, each with a verdict, as report.json stores them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from h1export import forms
from h1export.forms import Count
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
# of a SPEED: tokens of all sequences a second; its interval is "low" and "high"
SPEED = "tokens_per_second"
# of a SHARED_INTEGERS: tensors with integers, and how many of them have the integers of the first artifact
TENSORS = "tensors"
AS_FIRST = "as in 1"
OUTPUT_FIGURES = ("logits", "states", "kl", "top1")  # of every row that compares logits and states
OUTPUT_KINDS = frozenset({CheckKind.CASE, CheckKind.CONTEXT})  # the kinds of those rows
Number = int | float | Literal["nan", "inf", "-inf"]  # in report.json: JSON has no such numbers
AGAIN = "run `h1export validate` again"


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
        case: the name of the case, of a CASE; the name of the integers, of a COST.
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

        ``passed`` and each row's ``verdict`` are for readers; they are derived again from the rows of the form.
        """
        rows = [{**asdict(row), "verdict": row.verdict} for row in self.rows]
        data = {"passed": self.passed, "subject": self.subject, "environment": self.environment, "rows": rows}
        return json.dumps(_spelled(data), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Report:
        """Return the report at ``path``.

        Raises:
            H1ExportError: it cannot be read, or is of another form than ``to_json`` writes.
        """
        return cls.from_json(forms.content(path, AGAIN), path)

    @classmethod
    def from_json(cls, text: str | bytes, where: object) -> Report:
        """Return the report that ``to_json`` wrote as ``text``; ``where`` names the file in messages.

        Raises:
            H1ExportError: not JSON, or of another form than ``to_json`` writes.
        """
        form = forms.parse(text, StoredReport, where=where, what="a report of this h1export", next_step=AGAIN)
        return cls(form.subject, form.environment, tuple(stored.row for stored in form.rows))


@dataclass(frozen=True)
class StoredRow:
    """A Row as report.json has it."""

    kind: CheckKind
    comparison: Comparison
    case: str
    phase: Phase | None
    length: Count | None
    device: str
    figures: Mapping[str, Number]
    tolerances: Mapping[str, Number]
    note: str
    details: Mapping[str, Number]
    histograms: Mapping[str, Histogram]
    verdict: Verdict  # for readers

    def __post_init__(self) -> None:
        if odd := self.tolerances.keys() - self.figures.keys():
            raise ValueError(f"{len(odd)} tolerances are of no figure")

    @property
    def row(self) -> Row:
        given = {field.name: getattr(self, field.name) for field in fields(Row)}
        numbers = {
            name: {key: float(value) if isinstance(value, str) else value for key, value in given[name].items()}
            for name in ("figures", "tolerances", "details")
        }
        return Row(given.pop("kind"), given.pop("comparison"), **{**given, **numbers})


@dataclass(frozen=True)
class StoredReport:
    """A Report as report.json has it."""

    passed: bool  # for readers
    subject: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[StoredRow, ...]


def _spelled(value: Any) -> Any:
    """Return ``value`` with a string for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
