"""With every display text renamed, tables, page and JUnit are the same: nothing finds rows by text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.cli.junit import to_junit
from h1export.cli.tables import gate_table, report_tables
from h1export.report import labels
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.report.page import page
from h1export.report.report import Report, Row, Verdict
from h1export.report.stored_report import JudgedArtifact
from h1export.validate.speed import gate_checks
from h1export.validate.speed.gate_checks import Check, GateCheckKind
from h1export.validate.speed.gate_file import Gate
from h1export.validate.speed.regression import GateReport
from h1export.validate.speed.worker import Timing

Judge = Callable[..., Path]
CHECKS = (
    Check(GateCheckKind.NODES, Verdict.PASS, file="model.onnx", figure=3, limit=3),
    Check(GateCheckKind.FILE_BYTES, Verdict.FAIL, figure=5, limit=4, note="a 5, was 4"),
    Check(GateCheckKind.TIMING, Verdict.INCONCLUSIVE, timing=Timing(Phase.DECODE, 512), figure=1.1, limit=1.1),
    Check(GateCheckKind.MEASUREMENTS, Verdict.NOT_APPLICABLE, note="an emulation"),
)


@pytest.fixture
def rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Rename every display text to one that holds neither its old words nor its numbers, and no two alike."""
    known: dict[str, str] = {}

    def other(text: str) -> str:
        letters = "".join(chr(ord("A") + int(digit)) for digit in str(len(known)))
        return known.setdefault(text, f"Zz{letters}zZ")

    def apply() -> None:
        for module, names in (
            (labels, ("check_label", "comparison_label")),
            (gate_checks, ("check_label", "timing_label")),
        ):
            for name in names:
                old = getattr(module, name)
                monkeypatch.setattr(module, name, lambda row, old=old: other(old(row)))

    return apply


def plain(text: str) -> str:
    """The page without the cells and list items that hold display texts."""
    text = re.sub(r"(<tr data-row=[^>]*>)<td>.*?</td><td>.*?</td>", r"\1", text)
    return re.sub(r"<li>.*?</li>", "", text)


@pytest.mark.ort
def test_the_page_is_the_same_under_other_names(judged: Judge, rename: Callable[[], None]) -> None:
    folders = [judged("right"), judged("wrong", size=3.0)]
    before = page(folders)
    rename()
    after = page(folders)
    assert "bisect prefill" in before
    assert "bisect prefill" not in after
    assert plain(after) == plain(before)
    assert len(re.findall(r"<data ", after)) == len(re.findall(r"<data ", before)) > 200
    assert len(re.findall(r"<svg", after)) == 17


def printed(report: Report) -> list[list[list[str]]]:
    """The cells of the tables, without the columns that name the rows."""
    cases, others = report_tables(report)
    columns = [*cases.table.columns[2:], *others.table.columns[1:]]
    return [[str(cell) for cell in column.cells] for column in columns]


def names_of(report: Report) -> set[str]:
    """The names of the rows that compare no outputs."""
    return {str(cell) for cell in report_tables(report)[1].table.columns[0].cells}


@pytest.mark.ort
def test_the_tables_have_the_same_figures_under_other_names(judged: Judge, rename: Callable[[], None]) -> None:
    report = JudgedArtifact.open(judged("right")).report
    before = printed(report)
    names = names_of(report)
    rename()
    assert printed(report) == before
    assert not names & names_of(report)
    assert {len(column) for column in before} == {10, len(report.rows) - 10}


def test_a_gates_report_has_the_same_cases_under_other_names(rename: Callable[[], None]) -> None:
    report = GateReport("out", Gate("ort", "int4"), {}, checks=CHECKS)
    before = ElementTree.fromstring(to_junit(report))
    shown = [list(column.cells) for column in gate_table(report).table.columns]
    rename()
    after = ElementTree.fromstring(to_junit(report))
    assert [case.get("name") for case in before] == [
        "nodes model.onnx",
        "file bytes",
        "decode at 512",
        "memory and timings",
    ]
    assert all(str(case.get("name")).startswith("Zz") for case in after)
    for case in (*before, *after):
        del case.attrib["name"]
    assert ElementTree.tostring(after) == ElementTree.tostring(before)
    assert [list(column.cells) for column in gate_table(report).table.columns][1:] == shown[1:]


def test_every_kind_and_comparison_has_a_label() -> None:
    rows = [Row(kind, comparison, case="one token") for kind in CheckKind for comparison in Comparison]
    assert all(labels.check_label(row) and labels.comparison_label(row) for row in rows)
    assert len({labels.check_label(row) for row in rows}) == len(CheckKind)
    assert len({labels.comparison_label(row) for row in rows}) == len(Comparison)
    assert {kind for check in CHECKS for kind in [check.kind]} < set(GateCheckKind)


def test_labels_hold_what_tells_rows_apart() -> None:
    row = Row(CheckKind.CONTEXT_COST, Comparison.ALONE, length=64, device="CPU_ONLY")
    assert labels.check_label(row) == "cost at 64, CPU_ONLY"
    assert labels.check_label(Row(CheckKind.LATENCY, Comparison.SOURCE, phase=Phase.DECODE)) == "decode latency"
    assert labels.check_label(Row(CheckKind.CONTEXT, Comparison.DRIFT, length=2048)) == "context 2048"
