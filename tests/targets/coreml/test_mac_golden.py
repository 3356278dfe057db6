"""golden.npz: its arrays, and its bytes."""

from __future__ import annotations

import io
import sys
import zipfile
from typing import Any

import numpy as np
import pytest
from coreml_toy import (
    CHUNK,
    STEPS,
    TEXT,
    data,
    truth,
)

from h1export.errors import H1ExportError
from h1export.targets.coreml.mac.golden import TOLERANCE


def test_golden_arrays() -> None:
    """The arrays are those of the table in golden.py."""
    found = np.load(io.BytesIO(data(prompts=[1, CHUNK + 1, 30])), allow_pickle=False)
    assert (found["format"], found["tolerance"], found["steps"]) == (1, TOLERANCE, STEPS)
    assert found["prompts"].tolist() == [1, CHUNK + 1, 30]
    np.testing.assert_array_equal(found["ids"], TEXT)
    wanted = [*range(STEPS + 1), *range(CHUNK - 1, CHUNK + STEPS + 1), *range(29, 30 + STEPS)]
    assert found["positions"].tolist() == sorted(set(wanted))
    np.testing.assert_array_equal(found["logits"], truth()[found["positions"]].astype(np.float16))
    assert found["ids"].dtype == found["prompts"].dtype == found["positions"].dtype == np.int32


def test_golden_bytes_know_neither_time_nor_system(monkeypatch: pytest.MonkeyPatch) -> None:
    first = data()
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr(sys, "platform", "win32")
    assert data() == first
    assert {entry.date_time for entry in zipfile.ZipFile(io.BytesIO(first)).infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    "wrong", [{"prompts": []}, {"prompts": [0]}, {"prompts": [len(TEXT) - STEPS + 1]}, {"steps": 0}], ids=str
)
def test_golden_cases_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(H1ExportError, match=r"golden cases: prompts of .* give at least one length"):
        data(**wrong)
