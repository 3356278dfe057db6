"""What executes a package on a Mac, over a stand-in for coremltools whose models are our evaluator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.runtime.runner import Observable, TracksMagnitudes
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Evaluator, Package

CALLS = (7, 1, 66)


class MadeState(dict[str, Any]):
    """The state that a model makes, with coremltools' methods."""

    def write_state(self, name: str, array: Any) -> None:
        self[name] = array

    def read_state(self, name: str) -> Any:
        return self[name]


class Model:
    """The parts of coremltools' MLModel that the Runner calls."""

    def __init__(self, package: str, *, function_name: str, compute_units: str) -> None:
        assert compute_units == "CPU and GPU"
        self._evaluator = Evaluator(Package.open(Path(package)), function_name)

    def make_state(self) -> MadeState:
        return MadeState()

    def predict(self, inputs: dict[str, Any], state: MadeState | None = None) -> Any:
        return self._evaluator.run(inputs, {} if state is None else state)


def as_on_a_mac(patch: pytest.MonkeyPatch) -> None:
    models = SimpleNamespace(MLModel=Model)
    units = SimpleNamespace(CPU_AND_GPU="CPU and GPU")
    patch.setattr(sdk, "coremltools", lambda: SimpleNamespace(ComputeUnit=units, models=models))
    patch.setattr(sys, "platform", "darwin")


@pytest.mark.parametrize("state_io", [False, True])
def test_core_ml_is_called_as_the_evaluator_is(
    state_io: bool,
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps and a session; Core ML shows neither values between ops nor magnitudes."""
    artifact = build(make_checkpoint(num_hidden_layers=1), "int4", target="coreml", max_context=192, state_io=state_io)
    evaluated = load_runner(artifact)
    as_on_a_mac(monkeypatch)
    runner = load_runner(artifact)
    assert isinstance(evaluated, Observable)
    assert isinstance(evaluated, TracksMagnitudes)
    assert not isinstance(runner, Observable | TracksMagnitudes)
    assert (runner.provenance.kernels, runner.provenance.emulated) == ("Core ML", False)
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (1, sum(CALLS)), dtype=np.int64)
    states = runner.initial(1)
    expected = evaluated.initial(1)
    session = runner.start(1, sum(CALLS))
    end = 0
    for tokens in CALLS:
        end += tokens
        part = ids[:, end - tokens : end]
        mask = np.ones((1, end), np.int64)
        before = runner.snapshot(states)
        found, after = runner.step(part, mask, states)
        truth, expected = evaluated.step(part, mask, expected)
        np.testing.assert_array_equal(found, truth)
        np.testing.assert_array_equal(session.append(part), truth)
        assert runner.length(after) == evaluated.length(expected) == session.length == end
        for key, state in runner.snapshot(states).items():
            np.testing.assert_array_equal(state, before[key])  # a caller may step twice from one
        states = after
    for key, state in runner.snapshot(states).items():
        np.testing.assert_array_equal(state, evaluated.snapshot(expected)[key])
