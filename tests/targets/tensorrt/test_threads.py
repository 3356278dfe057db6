"""What threads and forks may share of TensorRT's network on a CPU; test_engine_runner.py has an engine's threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from threaded_runners import CHECKS, by_session, check_threads

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner


@pytest.fixture
def artifact(make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], without_plugin: None) -> Artifact:
    return build(make_checkpoint(), "int4", target="trt", max_context=128, runtime="tensorrt")


@pytest.mark.parametrize("check", CHECKS)
def test_sharing(artifact: Artifact, check: str) -> None:
    if check == "one_call":  # its save needs float32 arithmetic to be exact
        return CHECKS[check](load_runner(artifact, float32=True, kernels="stock"))
    return CHECKS[check](load_runner(artifact, kernels="stock"))


def test_magnitudes_are_those_of_one_thread(artifact: Artifact) -> None:
    alone: Any = load_runner(artifact, kernels="stock")
    for seed in range(4):
        by_session(alone, seed)
    runner: Any = load_runner(artifact, kernels="stock")
    check_threads(runner, ways=(by_session,))
    found = runner.magnitudes()
    assert found == alone.magnitudes()
    found.clear()  # a copy, which no call changes
    assert runner.magnitudes()
