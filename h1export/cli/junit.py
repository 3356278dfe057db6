"""A gate's report as JUnit XML, which CI systems read."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from h1export.errors import printable
from h1export.report.report import Verdict
from h1export.validate.speed import gate_checks

if TYPE_CHECKING:  # JUnit is written without loading what measures
    from h1export.validate.speed.regression import GateReport

ELEMENTS = {Verdict.FAIL: "failure", Verdict.INCONCLUSIVE: "error", Verdict.NOT_APPLICABLE: "skipped"}


def to_junit(report: GateReport) -> str:
    """Return one test case a check: FAIL is a failure, INCONCLUSIVE an error, NOT_APPLICABLE skipped."""
    suite = ElementTree.Element(
        "testsuite", name=printable(f"h1export gate {report.artifact}"), tests=str(len(report.checks))
    )
    for verdict, element in ELEMENTS.items():
        count = sum(check.verdict is verdict for check in report.checks)
        suite.set({"failure": "failures", "error": "errors"}.get(element, element), str(count))
    for check in report.checks:
        classname = f"{report.gate.target}.{report.gate.quant}"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=gate_checks.check_label(check))
        if check.verdict in ELEMENTS:
            message = (
                check.note if check.figure is None else f"{check.figure:.10g}, limit {check.limit:.10g}; {check.note}"
            )
            ElementTree.SubElement(case, ELEMENTS[check.verdict], message=printable(message), type=check.verdict)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
