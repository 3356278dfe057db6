"""The order of a report's rows, which are found in another order."""

from __future__ import annotations

import itertools

import pytest

from h1export.report.checks import CheckKind, Comparison
from h1export.report.report import Row
from h1export.validate.accuracy.run import in_order

BEFORE = [Row(CheckKind.STORED_INTEGERS, Comparison.SOURCE), Row(CheckKind.PUBLISHED, Comparison.GOLDEN)]
RANGE = [Row(CheckKind.FP16_RANGE, Comparison.FP16_LIMIT)]
SOURCE = [Row(CheckKind.CASE, Comparison.SOURCE, case=case) for case in "ab"]
AFTER = [Row(CheckKind.GREEDY_TEXT, Comparison.SOURCE), Row(CheckKind.LATENCY, Comparison.SOURCE)]
STORED = [Row(CheckKind.CASE, Comparison.STORED, case=case) for case in "ab"]
DRIFT = [Row(CheckKind.CASE, Comparison.DRIFT, case=case) for case in "ab"]
LAST = [Row(CheckKind.GREEDY_TEXT, Comparison.STORED), Row(CheckKind.GREEDY_TEXT, Comparison.DRIFT)]


@pytest.mark.parametrize("fp16", [[], RANGE], ids=["", "range"])
@pytest.mark.parametrize("lowering", [[], [STORED], [STORED, DRIFT]], ids=["none", "stored", "both"])
def test_the_lowering_precedes_the_cases(fp16: list[Row], lowering: list[list[Row]]) -> None:
    by_case = list(itertools.chain.from_iterable(zip(*lowering, strict=True)))  # each case with both comparisons
    found = [*BEFORE, *fp16, *SOURCE, *AFTER, *by_case, *LAST]
    expected = [*BEFORE, *itertools.chain.from_iterable(lowering), *fp16, *SOURCE, *AFTER, *LAST]
    assert in_order(found) == expected
