"""`h1export doctor` on CoreML packages: the evaluator off a Mac, and macOS that is too old."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.targets import get_target
from h1export.targets.base import Finding

pytestmark = pytest.mark.coreml


@pytest.fixture
def artifact(make_checkpoint: Callable[..., Path], build: Callable[..., Artifact]) -> Artifact:
    return build(make_checkpoint(), "none", target="coreml", max_context=128)


def found(artifact: Artifact) -> dict[str, Finding]:
    findings = get_target("coreml").examine(artifact, build=False, progress=SILENT)
    return {finding.name: finding for finding in findings}


def test_off_a_mac_the_evaluator_computes(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    findings = found(artifact)
    assert findings["macOS"].passed is None
    assert findings["loading"].passed is True
    assert "evaluator" in findings["loading"].detail


@pytest.mark.parametrize(("version", "passed"), [("14.7", False), ("15.0.1", True), ("26.1", True)])
def test_macos_has_states_from_15_on(
    version: str, passed: bool, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Artifact) -> None:
        raise H1ExportError("Core ML", "cannot load", "report it")

    monkeypatch.setattr("h1export.targets.coreml.runner.load", load)
    monkeypatch.setattr("h1export.targets.coreml.examine.sys.platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: (version, ("", "", ""), ""))
    findings = found(artifact)
    assert findings["macOS"].passed is passed
    assert findings["loading"] == Finding("loading", False, "Core ML: cannot load", "report it")
