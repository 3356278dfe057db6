"""Section a's comparison of the host with pack.py's list, and what hides a package in a dry run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from gpu_host import bundle, dry
from gpu_host.section import Host
from gpu_host.sections import environment


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_listed_package_that_is_missing_fails_and_another_version_is_shown(
    missing: bool, device: str, tmp_path: Path
) -> None:
    here = {"numpy": metadata.version("numpy"), "packaging": "0.0.1", **({"no-such-package": "1"} if missing else {})}
    (tmp_path / bundle.FILE).write_text(json.dumps({"format": bundle.FORMAT, "host": here}))
    row = environment.listed(Host(tmp_path, tmp_path, device))
    assert row.passed is (None if device == "cpu" else not missing)
    assert row.figures == {"listed": 2 + missing, "missing": int(missing), "other_version": 1}
    other = f"packaging {metadata.version('packaging')} instead of 0.0.1"
    assert row.detail == ("not installed: no-such-package; " if missing else "") + other


@pytest.mark.parametrize("imported", [False, True])
def test_a_hidden_package_is_found_again_afterwards(
    imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hidden_{imported}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("VALUE = 1")
    (tmp_path / name / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = importlib.import_module(name) if imported else None
    with dry.hidden(name):
        assert importlib.util.find_spec(name) is None
        for module in (name, f"{name}.part"):
            with pytest.raises(ImportError):
                importlib.import_module(module)
        kept = importlib.import_module("colorsys")  # what is imported meanwhile stays
    assert importlib.import_module("colorsys") is kept
    after = importlib.import_module(name)
    assert after.VALUE == 1
    assert before is None or after is before
