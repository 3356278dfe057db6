"""report.html: what `validate` found in one or several artifacts, on one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from h1export.model.falcon_h1.states import StateKind
from h1export.report import charts
from h1export.report.histogram import Histogram
from h1export.report.report import KL, LOGIT_ERROR, Verdict, within
from h1export.report.stored_report import OTHERS, JudgedArtifact

TEMPLATE = "report.html.jinja"
SHOWN = 5  # failures on top
CLASSES = {Verdict.PASS: "pass", Verdict.FAIL: "fail", Verdict.INFO: "info", Verdict.NOT_APPLICABLE: "na"}
SUMMARY: tuple[tuple[str, str, str, str], ...] = (  # label, check, against, figure
    ("bits per byte", "bits per byte", "source", "artifact"),
    ("bits per byte, PyTorch", "bits per byte", "source", "reference"),
    ("mean KL, nats", "bits per byte", "source", "kl"),
    ("99th percentile of KL", "bits per byte", "source", "kl_p99"),
    ("same likeliest token", "bits per byte", "source", "top1"),
    ("of the five likeliest", "bits per byte", "source", "top5"),
    ("greedy tokens until a difference, median", "greedy text", "source", "tokens"),
    ("greedy texts without one", "greedy text", "source", "never"),
    ("prefill, time relative to PyTorch", "prefill latency", "source", "ratio"),
    ("decode, time relative to PyTorch", "decode latency", "source", "ratio"),
)


def page(folders: Sequence[Path]) -> str:
    """The HTML of one page about the artifacts in ``folders``. All that they bring is escaped.

    Raises:
        H1ExportError: as of Subject.open, or no matplotlib.
    """
    subjects = [JudgedArtifact.open(folder) for folder in folders]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"exact": _exact, "short": _short}
    environment.tests["beyond"] = lambda row, name: name in row["limits"] and not _within(row, name)
    template = environment.from_string(files("h1export").joinpath("assets", TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        subjects=subjects, summary=_summary(subjects), sections=_sections(subjects), classes=CLASSES, shown=SHOWN
    )


def _within(row: Mapping[str, Any], name: str) -> bool:
    value = row["figures"][name]
    limit = row["limits"][name]
    return not isinstance(value, str) and within(name, value, limit)


def _exact(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _short(value: float | str | None) -> str:
    if value is None:
        return "n/a"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _summary(subjects: Sequence[JudgedArtifact]) -> list[dict[str, Any]]:
    """Lines of the table that has a column for every subject."""

    def line(label: str, cell: Callable[[JudgedArtifact], Any]) -> dict[str, Any]:
        return {"label": label, "cells": [cell(subject) for subject in subjects]}

    def figure(check: str, against: str, name: str) -> Callable[[JudgedArtifact], Any]:
        return lambda subject: next((row["figures"].get(name) for row in subject.of(check, against)), None)

    found = [
        line("target", lambda subject: subject.artifact.manifest.target),
        line("weights", lambda subject: str(subject.artifact.manifest.scheme["quant"])),
        line("bytes of all files", lambda subject: subject.nbytes),
        line("lowering: worst logit, of the range", lambda subject: subject.worst(subject.lowering, "logits")),
        line("lowering: worst state", lambda subject: subject.worst(subject.lowering, "states")),
        line("rounded activations: worst logit", lambda subject: subject.worst("drift", "logits")),
    ]
    return found + [line(label, figure(check, against, name)) for label, check, against, name in SUMMARY]


def _sections(subjects: Sequence[JudgedArtifact]) -> list[dict[str, Any]]:
    sections = [_spread(subjects), _layers(subjects), _contexts(subjects), _sizes(subjects)]
    return [section | {"charts": [chart for chart in section["charts"] if chart]} for section in sections]


def _chart(title: str, draw: Callable[[str], str], caption: str = "") -> dict[str, Any]:
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in title).split())
    return {"title": title, "svg": Markup(draw(name)), "caption": caption}


def _spread(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    def chart(
        title: str, axis: str, rows: Callable[[JudgedArtifact], Iterable[Mapping[str, Any]]], name: str
    ) -> dict[str, Any] | None:
        found = {index: _merged(rows(subject), name) for index, subject in enumerate(subjects)}
        shown = {index: one for index, one in found.items() if one is not None}
        return _chart(title, lambda id_: charts.histograms(id_, axis, shown)) if shown else None

    def text(subject: JudgedArtifact) -> Iterable[Mapping[str, Any]]:
        return subject.of("bits per byte", "source")

    error = "largest logit error of a position, of the range"
    return {
        "title": "How errors are spread",
        "text": "Lowering alone is artifact and PyTorch on the same weights, in float32. What quantisation costs shows on the text.",
        "missing": "The reports hold no distributions.",
        "charts": [
            chart("Logits, lowering alone", error, lambda subject: subject.cases(subject.lowering), name=LOGIT_ERROR),
            chart("Logits, rounded activations", error, lambda subject: subject.cases("drift"), name=LOGIT_ERROR),
            chart("Logits on the text, against the full model", error, text, name=LOGIT_ERROR),
            chart("KL divergence on the text", "nats, of a position", text, name=KL),
        ],
    }


def _merged(rows: Iterable[Mapping[str, Any]], name: str) -> Histogram | None:
    """The histograms of this name in one."""
    bins: dict[int, int] = {}
    for row in rows:
        found = row["histograms"].get(name, {"first": 0, "counts": []})
        for index, count in enumerate(found["counts"], found["first"]):
            bins[index] = bins.get(index, 0) + count
    return (
        Histogram(min(bins), tuple(bins.get(index, 0) for index in range(min(bins), max(bins) + 1))) if bins else None
    )


def _layers(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    def residual(phase: str) -> list[charts.Series]:
        rows = [
            (index, row)
            for index, subject in enumerate(subjects)
            for row in subject.of(f"bisect {phase}", subject.lowering)
        ]
        return [_by_layer(index, row["details"], "output", dashed=phase == "decode") for index, row in rows]

    def states(kind: StateKind) -> list[charts.Series]:
        found = []
        for index, subject in enumerate(subjects):
            details: dict[str, float] = {}
            for row in subject.cases(subject.lowering):
                details = {key: max(float(value), details.get(key, 0.0)) for key, value in row["details"].items()}
            found.append(_by_layer(index, details, kind))
        return found

    drawn = [
        (
            "Residual stream",
            [*residual("prefill"), *residual("decode")],
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


def _by_layer(subject: int, details: Mapping[str, Any], point: str, *, dashed: bool = False) -> charts.Series:
    values = {
        int(layer): float(value)
        for key, value in details.items()
        for layer, _, name in [key.partition(".")]
        if name == point
    }
    layers = sorted(values)
    return charts.Series(subject, layers, [values[layer] for layer in layers], dashed=dashed)


def _contexts(subjects: Sequence[JudgedArtifact]) -> dict[str, Any]:
    def curve(
        check: str, group: Callable[[JudgedArtifact], str], figure: str, dashed: bool = False
    ) -> list[charts.Series]:
        found = []
        for index, subject in enumerate(subjects):
            rows = [row for row in subject.of(check, group(subject)) if figure in row["figures"]]
            points = sorted((int(row["check"].split()[-1]), float(row["figures"][figure])) for row in rows)
            found.append(charts.Series(index, [x for x, _ in points], [y for _, y in points], dashed=dashed))
        return found

    def errors(figure: str) -> list[charts.Series]:
        return [
            *curve("context ", lambda s: s.lowering, figure),
            *curve("context ", lambda s: "drift", figure, dashed=True),
        ]

    axis = "tokens"
    ways = "lowering alone solid, rounded activations dashed"
    costs = {name: curve("cost at ", lambda s: "source", f"{name}_ms") for name in ("prefill", "decode")}
    return {
        "title": "By context",
        "text": "After a prefill in chunks: errors, and what a token costs there.",
        "missing": "Not measured: run validate with --context N, once for each length.",
        "charts": [
            _line_chart("Worst state", axis, "error", series=errors("states"), caption=ways),
            _line_chart("Logits of the last positions", axis, "error", series=errors("logits"), caption=ways),
            *(
                _line_chart(f"Cost of a token, {name}", axis, "ms", series=series, log=False)
                for name, series in costs.items()
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
        "text": "What the integers of each kind of tensor take, with their scales; all else is floats, the graph and the tokenizer.",
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
