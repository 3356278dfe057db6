"""Models that llama.cpp takes, and how far its results are from transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.model.falcon_h1.states import StateSpec
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.states import state_errors

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
        ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (1, sum(CALLS)), dtype=np.int64)
        states: Any = runner.initial(1)
        logits = []
        end = 0
        for tokens in CALLS:
            end += tokens
            answer, states = runner.step(ids[:, end - tokens : end], np.ones((1, end), np.int64), states)
            logits.append(answer[0])
        truth, true_states = reference.full(ids[0])
        found = {key: state[0] for key, state in runner.snapshot(states).items()}
        errors = state_errors([(found, true_states)], StateSpec.of(runner.config))
        return relative_error(np.concatenate(logits), truth), max(errors.values())

    return measure
