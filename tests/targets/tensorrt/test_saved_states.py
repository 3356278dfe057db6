"""Saved states of TensorRT's sessions: of the network on a CPU; test_engine_runner.py has those of an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_sessions import CHECKS, check_chat, check_save_and_restore

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.runtime.runner import Runner


@pytest.fixture
def runner(make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], without_plugin: None) -> Runner[Any]:
    artifact = build(make_checkpoint(), "int4", target="trt", max_context=128, max_batch=2, runtime="tensorrt")
    return load_runner(artifact, 0, True, kernels="stock")


@pytest.mark.parametrize("rows", [1, 2])
def test_save_and_restore(runner: Runner[Any], rows: int) -> None:
    check_save_and_restore(runner, rows)


@pytest.mark.parametrize("check", CHECKS)
def test_sessions(runner: Runner[Any], check: str) -> None:
    CHECKS[check](runner)


def test_chat(spoken_checkpoint: Path, build: Callable[..., Artifact], tmp_path: Path, without_plugin: None) -> None:
    artifact = build(spoken_checkpoint, "int4", target="trt", max_context=192, runtime="tensorrt")
    check_chat(artifact, tmp_path / "out", "stock")
