"""`h1export serve` without its extra; with it, tests/serve has the tests."""

from __future__ import annotations

import sys

import pytest

from h1export.cli import run


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["h1export.cli.serve"], "find_spec", lambda _: None)
    assert run(["serve", "out"]) == 2
    assert capfd.readouterr().err == "h1export: starlette: is not installed; pip install 'h1export[serve]'\n"
