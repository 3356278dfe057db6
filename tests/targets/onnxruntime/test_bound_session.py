"""A session with states in place against Runner.step, which returns new states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.targets import Kernels

Build = Callable[..., Artifact]


@pytest.mark.parametrize("kernels", ["stock", "native"])
@pytest.mark.parametrize(("batch", "kv"), [(1, "fp16"), (2, "fp32"), (2, "int8")])
@pytest.mark.parametrize("spare", [0, 30])
def test_appending_in_place_is_step(
    batch: int, kv: str, spare: int, kernels: Kernels, tiny: Path, build: Build
) -> None:
    runner = load_runner(build(tiny, "int4", kv=kv), kernels=kernels)
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (batch, 33))
    session = runner.start(batch, capacity=33 + spare)
    states = runner.initial(batch)
    for start, end in [(0, 20), (20, 21), (21, 22), (22, 32), (32, 33)]:
        expected, states = runner.step(ids[:, start:end], np.ones((batch, end), np.int64), states)
        found = session.append(ids[:, start:end])
        assert session.length == runner.length(states) == end
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_does_not_fit_is_refused_and_changes_nothing(tiny: Path, build: Build) -> None:
    runner = load_runner(build(tiny, "int4"))
    session = runner.start(1, capacity=8)
    again = runner.start(1, capacity=8)
    prompt = np.arange(8)[None, :7]
    token = np.array([[9]])
    session.append(prompt)
    again.append(prompt)
    for refused in (
        np.zeros((1, 2), np.int64),
        np.zeros((2, 1), np.int64),
        np.array([[-1]]),
        np.zeros((1, 0), np.int64),
    ):
        with pytest.raises(H1ExportError):
            session.append(refused)
    assert np.array_equal(session.append(token), again.append(token))
