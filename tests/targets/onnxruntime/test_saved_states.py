"""Saved states of ONNX Runtime's sessions: states in place, and those of a graph that returns new ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from saved_sessions import CHECKS, check_conversations, check_save_and_restore, random_ids

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.model.falcon_h1.states import StateKind
from h1export.runtime.runner import Runner
from h1export.targets.onnxruntime.bound_session import BoundSession

Build = Callable[..., Artifact]
# of the range: where another division into calls adds in another order, a key may be rounded to its other neighbour
HALVES = 1e-4
CODES = 1e-2
GRAPHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "native": ({}, {"kernels": "native"}),
    "stock": ({}, {"kernels": "stock"}),
    "native, fp16 cache": ({"kv": "fp16"}, {"kernels": "native"}),
    "stock, fp16 cache": ({"kv": "fp16"}, {"kernels": "stock"}),
    "native, int8 cache": ({"kv": "int8"}, {"kernels": "native"}),
    "stock, int8 cache": ({"kv": "int8"}, {"kernels": "stock"}),
    "portable": ({"graph": "portable"}, {}),
    "earlier": ({}, {"kernels": "stock"}),
}


@pytest.fixture(params=GRAPHS)
def runner(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], build: Build, earlier_build: Build
) -> Runner[Any]:
    options, how = GRAPHS[request.param]
    return load_runner((earlier_build if request.param == "earlier" else build)(make_checkpoint(), **options), **how)


@pytest.mark.parametrize("rows", [1, 3])
def test_save_and_restore(runner: Runner[Any], rows: int) -> None:
    check_save_and_restore(runner, rows)


@pytest.mark.parametrize("check", CHECKS)
def test_sessions(runner: Runner[Any], check: str) -> None:
    if check == "conversations" and not runner.provenance.float32:
        codes = runner.initial(1)["past_key_values.0.key"].dtype == np.int8
        check_conversations(runner, tolerance=CODES if codes else HALVES)
    else:
        CHECKS[check](runner)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_states_of_16_bits(half: type[Any], make_checkpoint: Callable[..., Path], build: Build) -> None:
    """What is in buffers of 16 bits comes back bit for bit; a CPU cannot run all of these, so buffers are looked at."""
    runner: Any = load_runner(build(make_checkpoint()), kernels="stock")
    session = runner.start(2, 20)
    assert isinstance(session, BoundSession)
    session.append(random_ids(runner, 2, 6))
    saved = session.save(1)
    graph = session._graph
    layout = replace(graph.state_layout, dtypes=dict.fromkeys(StateKind, half))
    narrow = BoundSession(replace(graph, state_layout=layout), 2, 20)
    narrow.restore(saved)
    found = narrow.save(0)
    assert found.length == 6
    for key, array in saved.arrays.items():
        assert np.array_equal(found.arrays[key], array.astype(half).astype(np.float32))
