"""Saved states of CoreML's sessions: states that the package has, and states that pass through every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_sessions import CHECKS, check_chat, check_save_and_restore

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.runtime.runner import Runner


@pytest.fixture(params=["passed", "held"])
def runner(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], build: Callable[..., Artifact]
) -> Runner[Any]:
    passed = request.param == "passed"
    options = {"state_io": passed, "max_context": 128, "compute": "fp32" if passed else "fp16"}
    return load_runner(build(make_checkpoint(), target="coreml", **options))


def test_save_and_restore(runner: Runner[Any]) -> None:
    check_save_and_restore(runner, 1)


@pytest.mark.parametrize(
    ("runner", "check"),
    # in half precision, calls of other sizes round otherwise
    [*(("passed", check) for check in CHECKS), *(("held", check) for check in ("copy", "stale", "refused"))],
    indirect=["runner"],
)
def test_sessions(runner: Runner[Any], check: str) -> None:
    CHECKS[check](runner)


def test_chat(spoken_checkpoint: Path, build: Callable[..., Artifact], tmp_path: Path) -> None:
    check_chat(build(spoken_checkpoint, target="coreml", max_context=192), tmp_path / "out")
