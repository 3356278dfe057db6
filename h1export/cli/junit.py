"""A gate's report as JUnit XML, which CI systems read."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from h1export.report.report import Verdict

if TYPE_CHECKING:  # written without loading what was measured
    from h1export.validate.speed.regression import GateReport

ELEMENTS = {Verdict.FAIL: "failure", Verdict.INCONCLUSIVE: "error", Verdict.NOT_APPLICABLE: "skipped"}


def to_junit(report: GateReport) -> str:
    """JUnit XML with a test case for each check.

    A failed check is a failure, an inconclusive one an error, and one that does not apply is skipped.
    """
    suite = ElementTree.Element("testsuite", name=f"h1export gate {report.artifact}", tests=str(len(report.checks)))
    for verdict, element in ELEMENTS.items():
        count = sum(check.verdict is verdict for check in report.checks)
        suite.set({"failure": "failures", "error": "errors"}.get(element, element), str(count))
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{report.gate.target}.{report.gate.quant}", name=check.name
        )
        if check.verdict in ELEMENTS:
            message = (
                check.note if check.figure is None else f"{check.figure:.10g}, limit {check.limit:.10g}; {check.note}"
            )
            ElementTree.SubElement(case, ELEMENTS[check.verdict], message=message, type=check.verdict)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
