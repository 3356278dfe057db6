"""What threads and forks may share of ONNX Runtime's runners, with our kernels and without, over one thread and two."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from threaded_runners import CHECKS, ROOM, by_session, check_threads, random_ids

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.runtime.sharing import OneCall
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import product_limits
from h1export.targets.onnxruntime.bound_session import BoundSession
from h1export.targets.onnxruntime.calls import Serial

Build = Callable[..., Artifact]
GRAPHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "native": ({}, {"kernels": "native", "threads": 2}),
    "rounded": ({"accuracy_level": 4, "quant": "int4"}, {"kernels": "native", "threads": 2}),
    "stock": ({}, {"kernels": "stock", "threads": 2}),
    "portable": ({"graph": "portable"}, {"threads": 1}),
}


@pytest.fixture(params=GRAPHS)
def runner(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], build: Build) -> Any:
    options, how = GRAPHS[request.param]
    return load_runner(build(make_checkpoint(), **options), **how)


@pytest.mark.parametrize("check", CHECKS)
def test_sharing(runner: Any, check: str) -> None:
    CHECKS[check](runner)


def test_sessions_share_no_buffer(make_checkpoint: Callable[..., Path], build: Build) -> None:
    runner: Any = load_runner(build(make_checkpoint()))
    sessions = [runner.start(1, ROOM) for _ in range(3)]
    places = [value.data_ptr() for session in sessions for value in session._states.values()]
    assert len(set(places)) == len(places)


def test_a_shared_buffer_is_seen(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the test: where all sessions of a runner have the buffers of the first, other logits follow."""
    runner: Any = load_runner(build(make_checkpoint()))
    first = runner.start(1, ROOM)
    bind = BoundSession._bind

    def shared(session: Any, row: int, rows: int) -> Any:
        session._states = first._states
        return bind(session, row, rows)

    monkeypatch.setattr(BoundSession, "_bind", shared)
    with pytest.raises(AssertionError):
        check_threads(runner, ways=(by_session,))


def test_without_the_guard_the_checks_fail(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneCall, "__enter__", lambda self: None)
    monkeypatch.setattr(OneCall, "__exit__", lambda self, *_: None)
    runner = load_runner(build(make_checkpoint()))
    for name in ("one_call", "fork"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            CHECKS[name](runner)


def test_a_lookup_at_every_token_is_seen(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load_runner(build(make_checkpoint()))
    monkeypatch.setattr(sdk, "onnxruntime", sdk.onnxruntime.__wrapped__)  # without its cache
    with pytest.raises(AssertionError):
        CHECKS["files"](runner)


def test_captured_sessions_run_one_call_at_a_time() -> None:
    """ONNX Runtime allows no two runs at once of a session that captures CUDA graphs."""

    class Session:
        inside = most = 0

        def run(self, number: int) -> int:
            self.inside += 1
            self.most = max(self.most, self.inside)
            barrier.wait(0.001)
            self.inside -= 1
            return number

        run_with_iobinding = run_with_ort_values = run
        name = "x"

    barrier = Event()  # never set: its wait lets other threads run
    session: Any = Session()
    serial = Serial(session)
    calls = (serial.run, serial.run_with_iobinding, serial.run_with_ort_values)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda number: calls[number % 3](number), range(60))) == list(range(60))
    assert session.most == 1
    assert serial.name == "x"


@pytest.mark.parametrize("tied", [False, True])
def test_products_beyond_what_onnxruntime_counts(
    tied: bool, make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of int8 that its products in float32 cannot count is refused, where it is multiplied with by them."""
    checkpoint = make_checkpoint("tied" if tied else "plain", num_hidden_layers=1, vocab_size=900)
    exact = build(checkpoint, "int8")
    rounded = build(checkpoint, "int8", accuracy_level=4)
    head = exact.config.vocab_size * exact.config.hidden_size  # the largest
    monkeypatch.setattr(product_limits, "MOST_ELEMENTS", head - 1)
    for artifact, how in ((exact, {}), (rounded, {"float32": True})):
        with pytest.raises(
            H1ExportError, match=rf"has \d+ elements, and onnxruntime takes {head - 1} .*; run h1export"
        ):
            load_runner(artifact, kernels="stock", **how)
    for artifact, kernels in ((exact, "native"), (rounded, "stock"), (build(checkpoint, "none"), "stock")):
        ids = random_ids(runner := load_runner(artifact, kernels=kernels), 4, 0)  # type: ignore[arg-type]
        assert np.isfinite(runner.start(1, ROOM).append(ids)).all()
    monkeypatch.setattr(product_limits, "MOST_ELEMENTS", head)
    load_runner(exact, kernels="stock")


def test_portable_products_beyond_what_onnxruntime_makes(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build(make_checkpoint(), "int4", graph="portable")
    monkeypatch.setattr(product_limits, "MOST_ELEMENTS", 259 * 128 - 1)
    with pytest.raises(H1ExportError, match=r"in such a product; use --graph cpu"):
        load_runner(artifact)
