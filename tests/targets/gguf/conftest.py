"""Models that llama.cpp takes, and how far its results are from transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runner_errors import worst as errors_over

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.validate.accuracy.reference import Reference

Worst = Callable[..., tuple[float, float]]
CALLS = (40, 1, 1, 23, 1, 3)  # prefills and decodes, in any order


@pytest.fixture(scope="session")
def worst() -> Worst:
    """worst(artifact, checkpoint) -> the errors of logits and states over CALLS, relative to their ranges.

    The reference holds what the artifact stores. ``float32`` is that of ``load_runner``.
    """

    def measure(artifact: Artifact, checkpoint: Path, float32: bool = True) -> tuple[float, float]:
        runner: Any = load_runner(artifact, 1, float32)
        reference = Reference(checkpoint)
        reference.hold({**runner.stored_weights(), **runner.stored_floats()})
        return errors_over(runner, reference, CALLS)

    return measure
