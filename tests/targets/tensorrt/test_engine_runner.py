"""What runs on a GPU host, over a stand-in for TensorRT that computes the network at the addresses it is given."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import HOST, FakeGpu, FakeTensorRT
from saved_sessions import check_save_and_restore, check_saved_is_a_copy
from threaded_runners import CHECKS

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.runtime.runner import Runner
from h1export.targets.tensorrt.engine.finalize import build_engine_here
from h1export.targets.tensorrt.engine.requirements import Host
from h1export.validate.accuracy.run import ValidateOptions, validate

ROOM = 192


@pytest.fixture(params=["fp16", "bf16"])
def compute(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def finished(
    compute: str,
    make_checkpoint: Callable[..., Path],
    build: Callable[..., Artifact],
    without_plugin: None,
    gpu_host: None,
    tmp_path: Path,
) -> Artifact:
    """An artifact on a host with a GPU, with an engine of a few bytes."""

    options = {"max_context": ROOM, "max_batch": 2, "runtime": "tensorrt", "architectures": (89,), "compute": compute}
    artifact = build(make_checkpoint(), "int4", target="trt", **options)
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "out"))
    build_engine_here(folder, SILENT)
    return Artifact.open(folder)


@pytest.fixture
def tensorrt(finished: Artifact, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(finished.folder)
    monkeypatch.setattr("h1export.targets.tensorrt.sdk.module", lambda *_: fake)
    monkeypatch.setattr("h1export.targets.tensorrt.gpu.runner.Gpu", FakeGpu)
    monkeypatch.setattr(FakeGpu, "recorded", 0)
    return fake


def ids_of(runner: Runner[Any], batch: int, tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(tokens).integers(0, runner.config.vocab_size, (batch, tokens), dtype=np.int64)


def test_calls_are_those_of_the_network(
    finished: Artifact, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with pads, prompts of several calls, and sequences that two calls continue."""
    monkeypatch.setattr("h1export.targets.tensorrt.network.limits.PREFILL_TOKENS", 32)
    runner, network = (load_runner(finished, kernels=kernels) for kernels in ("native", "stock"))
    ids = ids_of(runner, 2, 60)
    mask = np.ones((2, 60), np.int64)
    mask[1, :7] = 0
    ours = runner.initial(2)
    theirs = network.initial(2)
    for start, end in ((0, 40), (40, 41), (41, 60)):
        before = runner.snapshot(ours)
        found, after = runner.step(ids[:, start:end], mask[:, :end], ours)
        expected, theirs = network.step(ids[:, start:end], mask[:, :end], theirs)
        np.testing.assert_array_equal(found, expected)
        assert all(np.array_equal(before[key], state) for key, state in runner.snapshot(ours).items()), (
            "the caller's states changed"
        )
        ours = after
        assert runner.length(ours) == network.length(theirs) == end
        states = network.snapshot(theirs)
        assert states.keys() == runner.snapshot(ours).keys()
        for key, state in runner.snapshot(ours).items():
            np.testing.assert_array_equal(state, states[key])
    assert FakeGpu.recorded == 0


def test_saved_states_of_an_engine(finished: Artifact, tensorrt: FakeTensorRT) -> None:
    runner = load_runner(finished, kernels="native")
    check_save_and_restore(runner, 1)
    check_saved_is_a_copy(runner)
    padded = runner.initial(2)
    mask = np.ones((2, 5), np.int64)
    mask[1, :2] = 0
    _, after = runner.step(ids_of(runner, 2, 5), mask, padded)
    with pytest.raises(H1ExportError, match="the rows have pads"):
        after.save()


@pytest.mark.parametrize("compute", ["fp16"], indirect=True)
def test_decoding_is_recorded_once_and_replayed(finished: Artifact, tensorrt: FakeTensorRT) -> None:
    """Other sequences between its calls do not disturb the graph."""
    runner = load_runner(finished, kernels="native")
    tokens = ids_of(runner, 1, 20)
    others = ids_of(runner, 2, 30)
    expected, _ = runner.step(tokens, np.ones((1, 20), np.int64), runner.initial(1))
    session = runner.start(1, ROOM)
    beside = runner.start(2, ROOM)
    found = [session.append(tokens[:, :9])]
    for column in range(9, 20):
        found.append(session.append(tokens[:, column : column + 1]))
        beside.append(others[:, 2 * column : 2 * column + 1 + column % 2][:, :2] if column < 15 else others[:, :1])
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), expected, atol=5e-3 * np.ptp(expected)
    )  # in calls of other sizes
    assert session.length == 20
    assert FakeGpu.recorded == 2
    (engine,) = tensorrt.engines
    assert [context.asked for context in engine.contexts] == [0, 0, 2, 2]
    assert [config.dynamic_shapes_kernel_specialization_strategy for config in engine.configs] == [
        "eager",
        "lazy",
        "eager",
        "eager",
    ]
    assert len({id(config.cache) for config in engine.configs}) == 1


@pytest.mark.parametrize("compute", ["fp16"], indirect=True)
def test_what_cannot_be_recorded_is_launched(
    finished: Artifact, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(self: FakeGpu, launch: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = load_runner(finished, kernels="native")
    tokens = ids_of(runner, 1, 5)
    states = runner.initial(1)
    monkeypatch.setattr(FakeGpu, "record", record)
    session = runner.start(1, ROOM)
    for column in range(5):
        token = tokens[:, column : column + 1]
        called, states = runner.step(token, np.ones((1, column + 1), np.int64), states)
        np.testing.assert_array_equal(session.append(token), called)


def test_validate_judges_the_engine(
    finished: Artifact, tensorrt: FakeTensorRT, make_checkpoint: Callable[..., Path]
) -> None:
    runner = load_runner(finished)
    exact = load_runner(finished, float32=True)
    assert (runner.provenance.emulated, exact.provenance.emulated) == (False, True)
    slow = {"latency.prefill": 1e3, "latency.decode": 1e3}  # the stand-in is
    report = validate(
        finished, runner, exact, checkpoint=make_checkpoint(), options=ValidateOptions(slow, pairs=1), progress=SILENT
    )
    assert report.passed, report.to_json()
    (decode,) = [row for row in report.rows if row.kind is CheckKind.LATENCY and row.phase is Phase.DECODE]
    assert decode.figures["ratio"] > 0
    assert [row for row in report.rows if row.comparison is Comparison.DRIFT and row.figures]
    assert "TensorRT 10.15.1 on sm_89" in report.to_json()


@pytest.mark.parametrize("compute", ["fp16"], indirect=True)
class TestErrors:
    def test_the_requirements_are_checked_before_the_engine_is_read(
        self, finished: Artifact, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "here", lambda _config: replace(HOST, architecture=120))
        with pytest.raises(H1ExportError, match="the engine is for sm_89, and this GPU is sm_120"):
            load_runner(finished, kernels="native")
        assert tensorrt.engines == []
        runner = load_runner(finished)
        assert runner.provenance.emulated
        assert re.search(
            "is computed on the CPU, and not by its engine: .*this GPU is sm_120", runner.provenance.fallback
        )

    def test_what_tensorrt_does_not_load(self, finished: Artifact, tensorrt: FakeTensorRT) -> None:
        tensorrt.reads = False
        with pytest.raises(
            H1ExportError,
            match=r"model.engine: TensorRT 10.15.1 on sm_89 cannot load it: it is of another version; run",
        ):
            load_runner(finished, kernels="native")
        tensorrt.loads_plugin = False
        with pytest.raises(H1ExportError, match="cannot load the plugin: it gives no reason"):
            load_runner(finished, kernels="native")

    @pytest.mark.parametrize(
        ("raised", "said"),
        [
            (TypeError("factory function returned nullptr"), "TensorRT 10.15.1 on sm_89 does not start"),
            (RuntimeError("CUDA out of memory"), r"does not fit this GPU \(CUDA out of memory\)"),
        ],
    )
    def test_a_gpu_that_fails(
        self, raised: Exception, said: str, finished: Artifact, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> None:
            raise raised

        monkeypatch.setattr(tensorrt, "Runtime", fail)
        with pytest.raises(H1ExportError, match=said):
            load_runner(finished, kernels="native")

    def test_a_call_that_fails(self, finished: Artifact, tensorrt: FakeTensorRT) -> None:
        session = load_runner(finished, kernels="native").start(1, ROOM)
        tensorrt.engines[0].broken = True
        with pytest.raises(H1ExportError, match="cannot run: what it is bound to is wrong"):
            session.append(np.ones((1, 3), np.int64))

    def test_beyond_the_room(self, finished: Artifact, tensorrt: FakeTensorRT) -> None:
        runner = load_runner(finished, kernels="native")
        with pytest.raises(H1ExportError, match="--max-context 193"):
            runner.start(1, ROOM + 1)
        with pytest.raises(H1ExportError, match="--max-batch 3"):
            runner.initial(3)
        with pytest.raises(H1ExportError, match="1 rows; these are 2 sequences"):
            runner.start(2, ROOM).append(np.ones((1, 1), np.int64))
        session = runner.start(1, ROOM)
        session.append(np.ones((1, ROOM), np.int64))
        with pytest.raises(H1ExportError, match="--max-context 193"):
            session.append(np.ones((1, 1), np.int64))

    def test_a_runtime_that_is_not_whole(self, finished: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
        def find(name: str) -> None:
            raise OSError("libnvinfer.so.10: cannot open shared object file")

        monkeypatch.setattr("h1export.targets.tensorrt.gpu.runner.Gpu", FakeGpu)
        monkeypatch.setattr("h1export.targets.tensorrt.sdk.has", lambda _: True)
        monkeypatch.setattr("h1export.targets.tensorrt.sdk.import_module", find)
        with pytest.raises(H1ExportError, match=r"TensorRT: is installed and cannot be imported \(libnvinfer.so.10"):
            load_runner(finished, kernels="native")

    def test_without_a_gpu(self, finished: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(H1ExportError, match="torch: cannot use a GPU here; install PyTorch's build for CUDA"):
            load_runner(finished, kernels="native")


@pytest.mark.parametrize("compute", ["fp16"], indirect=True)
def test_what_has_no_room_is_not_timed(
    finished: Artifact, tensorrt: FakeTensorRT, make_checkpoint: Callable[..., Path]
) -> None:
    runner = load_runner(finished)
    exact = load_runner(finished, float32=True)
    report = validate(
        finished, runner, exact, checkpoint=make_checkpoint(), options=ValidateOptions(pairs=4), progress=SILENT
    )
    assert "208 tokens do not fit into 192" in {row.note for row in report.rows}


@pytest.mark.parametrize("compute", ["fp16"], indirect=True)
def test_threads_and_forks(finished: Artifact, tensorrt: FakeTensorRT) -> None:
    """Contexts are shared by sessions, so what a call binds is what it launches, whatever other threads do."""
    runner = load_runner(finished, kernels="native")
    for check in CHECKS.values():
        check(runner)
