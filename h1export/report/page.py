"""Write report.html: the reports of one or several artifacts on one page, which needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from h1export.model.falcon_h1.states import StateKind
from h1export.report import charts, labels, precisions
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.histogram import Histogram
from h1export.report.report import AS_FIRST, DECODE_MS, KL, LOGIT_ERROR, PREFILL_MS, SPEED, TENSORS, Row, Verdict
from h1export.report.stored_report import OTHERS, JudgedArtifact
from h1export.report.template import short, template

TEMPLATE = "report.html.jinja"
SHOWN = 5  # failures at the top of the page
CLASSES = {Verdict.PASS: "pass", Verdict.FAIL: "fail", Verdict.INFO: "info", Verdict.NOT_APPLICABLE: "na"}


@dataclass(frozen=True)
class SummaryLine:
    """A line of the summary table: a figure of the first row of this kind, phase and comparison."""

    label: str
    kind: CheckKind
    figure: str
    phase: Phase | None = None
    comparison: Comparison = Comparison.SOURCE

    def cell(self, subject: JudgedArtifact) -> float | None:
        return subject.figure(self.kind, self.figure, self.phase, comparison=self.comparison)


SUMMARY = (
    SummaryLine("bits per byte", CheckKind.TEXT, "artifact"),
    SummaryLine("bits per byte, PyTorch", CheckKind.TEXT, "reference"),
    SummaryLine("mean KL, nats", CheckKind.TEXT, "kl"),
    SummaryLine("99th percentile of KL", CheckKind.TEXT, "kl_p99"),
    SummaryLine("same likeliest token", CheckKind.TEXT, "top1"),
    SummaryLine("of the five likeliest", CheckKind.TEXT, "top5"),
    SummaryLine("greedy tokens until a difference, median", CheckKind.GREEDY_TEXT, "tokens"),
    SummaryLine("greedy texts without one", CheckKind.GREEDY_TEXT, "never"),
    SummaryLine("prefill, time relative to PyTorch", CheckKind.LATENCY, "ratio", phase=Phase.PREFILL),
    SummaryLine("decode, time relative to PyTorch", CheckKind.LATENCY, "ratio", phase=Phase.DECODE),
)
# lines of what only `compare` measures
COMPARED = (
    *(SummaryLine(f"{phase}, tokens per second", CheckKind.SPEED, SPEED, phase, Comparison.ALONE) for phase in Phase),
    SummaryLine("tensors with integers", CheckKind.SHARED_INTEGERS, TENSORS, comparison=Comparison.ALONE),
    SummaryLine("of them as in the first", CheckKind.SHARED_INTEGERS, AS_FIRST, comparison=Comparison.ALONE),
)


def page(folders: Sequence[Path]) -> str:
    """Return the HTML of one page about the artifacts in ``folders`` and the reports that are stored there.

    Raises:
        H1ExportError: as JudgedArtifact.open does, or matplotlib is not installed.
    """
    return page_of([JudgedArtifact.open(folder) for folder in folders])


def page_of(subjects: Sequence[JudgedArtifact]) -> str:
    """Return the HTML of one page about ``subjects``. Every text of an artifact or a report is escaped.

    Raises:
        H1ExportError: matplotlib is not installed.
    """
    return template(TEMPLATE, check=labels.check_label, comparison=labels.comparison_label).render(
        subjects=subjects, summary=_summary(subjects), sections=_sections(subjects), classes=CLASSES, shown=SHOWN
    )


def _summary(subjects: Sequence[JudgedArtifact]) -> list[dict[str, Any]]:
    """Return the lines of the table that has a column for every artifact."""

    def line(label: str, cell: Callable[[JudgedArtifact], Any]) -> dict[str, Any]:
        return {"label": label, "cells": [cell(subject) for subject in subjects]}

    found = [
        line("target", lambda subject: subject.artifact.manifest.target),
        line("weights", lambda subject: str(subject.artifact.manifest.scheme["quant"])),
        line("precisions of matrices", lambda subject: precisions.plan_words(subject.artifact)),
        line("bits of a weight in integers", lambda subject: precisions.bits(subject.artifact)),
        line("bytes of all files", lambda subject: subject.nbytes),
        line("lowering: worst logit, of the range", lambda subject: subject.worst(subject.lowering, "logits")),
        line("lowering: worst state", lambda subject: subject.worst(subject.lowering, "states")),
        line("rounded activations: worst logit", lambda subject: subject.worst(Comparison.DRIFT, "logits")),
    ]
    found += [
        line("as shipped: worst logit", lambda subject: subject.worst(Comparison.SOURCE, "logits")),
        *(line(one.label, one.cell) for one in SUMMARY),
    ]
    compared = [line(one.label, one.cell) for one in COMPARED]
    return found + [each for each in compared if any(cell is not None for cell in each["cells"])]


def _sections(subjects: Sequence[JudgedArtifact]) -> list[dict[str, Any]]:
    sections = [_spread(subjects), _precisions(subjects), _layers(subjects), _contexts(subjects), _sizes(subjects)]
    return [section | {"charts": [chart for chart in section["charts"] if chart]} for section in sections]


def _chart(title: str, draw: Callable[[str], str], caption: str = "") -> dict[str, Any]:
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in title).split())
    return {"title": title, "svg": Markup(draw(name)), "caption": caption}


def _spread(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    def chart(
        title: str, axis: str, rows: Callable[[JudgedArtifact], Iterable[Row]], *, name: str
    ) -> dict[str, Any] | None:
        found = {index: _merged(rows(subject), name) for index, subject in enumerate(subjects)}
        shown = {index: one for index, one in found.items() if one is not None}
        return _chart(title, lambda id_: charts.histograms(id_, axis, shown)) if shown else None

    def text(subject: JudgedArtifact) -> Iterable[Row]:
        return subject.rows_of(CheckKind.TEXT, Comparison.SOURCE)

    error = "largest logit error of a position, of the range"
    return {
        "title": "How errors are spread",
        "text": "Lowering alone compares artifact and PyTorch on the same weights, in float32. "
        "What quantisation costs shows on the text.",
        "missing": "The reports hold no distributions.",
        "charts": [
            chart("Logits, lowering alone", error, lambda subject: subject.outputs(subject.lowering), name=LOGIT_ERROR),
            chart(
                "Logits, rounded activations",
                error,
                lambda subject: subject.outputs(Comparison.DRIFT),
                name=LOGIT_ERROR,
            ),
            chart("Logits on the text, against the full model", error, text, name=LOGIT_ERROR),
            chart("KL divergence on the text", "nats, of a position", text, name=KL),
        ],
    }


def _precisions(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    plans = [precisions.bits_by_layer(subject.artifact) for subject in subjects]
    series = [charts.Series(index, list(plan), list(plan.values())) for index, plan in enumerate(plans)]
    found = [(precisions.bits(subject.artifact), subject.figure(CheckKind.TEXT, KL)) for subject in subjects]
    points = {index: (bits, kl) for index, (bits, kl) in enumerate(found) if kl is not None}
    caption = "; ".join(
        f"{subject.name}: {kl:.4g} nats, {short(bits)} bits ({precisions.plan_words(subject.artifact)})"
        for subject, (bits, kl) in zip(subjects, found, strict=True)
        if kl is not None
    )

    def divergence(name: str) -> str:
        return charts.bars(name, "nats", ["text"], values={index: [kl] for index, (_, kl) in points.items()})

    return {
        "title": "What precisions cost",
        "text": "The bits of a weight in every layer's integers, scales included, and the divergence that all layers "
        "together leave on the text. h1export sensitivity has the share of each tensor, before a build.",
        "missing": "",
        "charts": [
            _line_chart("Bits by layer", "layer", "bits", series=series, log=False),
            _chart("Mean KL", divergence, caption) if points else None,
        ],
    }


def _merged(rows: Iterable[Row], name: str) -> Histogram | None:
    """Return the sum of the rows' histograms of this name; None where there are none."""
    bins: dict[int, int] = {}
    for row in rows:
        if (found := row.histograms.get(name)) is not None:
            for index, count in enumerate(found.counts, found.first):
                bins[index] = bins.get(index, 0) + count
    return (
        Histogram(min(bins), tuple(bins.get(index, 0) for index in range(min(bins), max(bins) + 1))) if bins else None
    )


def _layers(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    def residual(phase: Phase) -> list[charts.Series]:
        return [
            _by_layer(index, row.details, "output", dashed=phase is Phase.DECODE)
            for index, subject in enumerate(subjects)
            for row in subject.rows_of(CheckKind.BISECT, subject.lowering, phase)
        ]

    def states(kind: StateKind) -> list[charts.Series]:
        found = []
        for index, subject in enumerate(subjects):
            details: dict[str, float] = {}
            for row in subject.outputs(subject.lowering):
                details = {key: max(value, details.get(key, 0.0)) for key, value in row.details.items()}
            found.append(_by_layer(index, details, kind))
        return found

    drawn = [
        (
            "Residual stream",
            [*residual(Phase.PREFILL), *residual(Phase.DECODE)],
            "prefill solid, decode dashed; from validate --bisect",
        )
    ]
    drawn += [(f"State: {kind}", states(kind), "the worst of all cases") for kind in StateKind]
    return {
        "title": "Error by layer",
        "text": "Of lowering alone, relative to the range of the reference.",
        "missing": "The reports hold no states.",
        "charts": [
            _line_chart(title, "layer", "error", series=series, caption=caption) for title, series, caption in drawn
        ],
    }


def _by_layer(artifact: int, details: Mapping[str, float], point: str, *, dashed: bool = False) -> charts.Series:
    """Return the errors at ``point`` of every layer, which ``details`` has as "LAYER.POINT"."""
    values = {
        int(layer): value for key, value in details.items() for layer, _, name in [key.partition(".")] if name == point
    }
    layers = sorted(values)
    return charts.Series(artifact, layers, [values[layer] for layer in layers], dashed=dashed)


def _contexts(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    def curve(
        kind: CheckKind, comparison: Callable[[JudgedArtifact], Comparison], figure: str, *, dashed: bool = False
    ) -> list[charts.Series]:
        found = []
        for index, subject in enumerate(subjects):
            rows = subject.rows_of(kind, comparison(subject))
            points = sorted(
                (row.length, row.figures[figure]) for row in rows if row.length is not None and figure in row.figures
            )
            found.append(charts.Series(index, [x for x, _ in points], [y for _, y in points], dashed=dashed))
        return found

    def errors(figure: str) -> list[charts.Series]:
        return [
            *curve(CheckKind.CONTEXT, lambda s: s.lowering, figure),
            *curve(CheckKind.CONTEXT, lambda s: Comparison.DRIFT, figure, dashed=True),
        ]

    axis = "tokens"
    caption = "lowering alone solid, rounded activations dashed"
    costs = {
        phase: curve(CheckKind.CONTEXT_COST, lambda s: Comparison.ALONE, figure)
        for phase, figure in ((Phase.PREFILL, PREFILL_MS), (Phase.DECODE, DECODE_MS))
    }
    return {
        "title": "By context",
        "text": "After a prefill in chunks: errors, and what a token costs there.",
        "missing": "Not measured: run validate with --context N, once for each length.",
        "charts": [
            _line_chart("Worst state", axis, "error", series=errors("states"), caption=caption),
            _line_chart("Logits of the last positions", axis, "error", series=errors("logits"), caption=caption),
            *(
                _line_chart(f"Cost of a token, {phase}", axis, "ms", series=series, log=False)
                for phase, series in costs.items()
            ),
        ],
    }


def _line_chart(
    title: str, x: str, y: str, *, series: list[charts.Series], caption: str = "", log: bool = True
) -> dict[str, Any] | None:
    shown = [one for one in series if one.x]
    return _chart(title, lambda id_: charts.lines(id_, x, y, series=shown, log=log), caption) if shown else None


def _sizes(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    kinds = list(
        dict.fromkeys(part["kind"] for subject in subjects for part in subject.parts if part["kind"] != OTHERS)
    )
    tables = [{part["kind"]: part for part in subject.parts} for subject in subjects]

    def of(column: str, shown: Sequence[str], scale: float) -> dict[int, list[float]]:
        return {
            index: [table.get(kind, {column: 0})[column] / scale for kind in shown]
            for index, table in enumerate(tables)
        }

    return {
        "title": "Size",
        "text": "The integers of each kind of tensor, with their scales. "
        "All else is floats, the graph and the tokenizer.",
        "missing": "",
        "charts": [
            _chart(
                "Megabytes",
                lambda id_: charts.bars(id_, "MB", [*kinds, "all else"], values=of("nbytes", [*kinds, OTHERS], 1e6)),
            ),
            _chart("Bits a weight", lambda id_: charts.bars(id_, "bits", kinds, values=of("bits", kinds, 1)))
            if kinds
            else None,
        ],
    }
