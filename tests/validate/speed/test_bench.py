"""What bench computes: statistics on planted numbers, bytes against the files, turns, and workers that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.cli.tables import bench_tables
from h1export.commands.bench import bench_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import StateSpec
from h1export.report.checks import Phase
from h1export.runtime.runner import Limits
from h1export.validate.accuracy.reference import Reference
from h1export.validate.speed import memory_traffic
from h1export.validate.speed.bench import BenchOptions, BenchReport, interleave
from h1export.validate.speed.memory_traffic import READ_BYTES, READS, Bandwidth, Turn, read_bandwidth, step_bytes
from h1export.validate.speed.statistics import CONFIDENCE, estimate, ratio
from h1export.validate.speed.worker import RunnerModel, Timing, WorkerProcess

Build = Callable[..., Artifact]


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials = [estimate(rng.normal(10, 1, 25).tolist()) for _ in range(200)]
    held = np.mean([found.low <= 10 <= found.high for found in trials])
    assert CONFIDENCE - 0.06 < held <= 1.0  # 4 standard errors of 200 trials at 95 %
    assert all(found.low <= found.median <= found.high for found in trials)
    assert (
        np.mean([found.high - found.low for found in trials]) < 1.6
    )  # and is not held by width: 2 * 1.96 * 1.25 / 5 = 0.98


def test_an_outlier_moves_neither_median_nor_interval() -> None:
    found = estimate([10.0] * 12 + [1000.0])
    assert (found.median, found.low, found.high) == (10.0, 10.0, 10.0)
    assert estimate([3.0]).spread == 0


def test_a_ratio_is_taken_round_by_round() -> None:
    load = np.array([1, 5, 2, 30, 1.0])  # slows both down alike
    assert ratio((load * 3).tolist(), (load * 2).tolist()) == estimate([1.5] * 5)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("config", ["plain", "tied"])
@pytest.mark.ort
def test_step_bytes_are_what_the_graph_holds(
    config: str, quant: str, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    kv = "fp16" if quant == "int4" else "fp32"
    artifact = build(make_checkpoint(config), quant, kv=kv)
    model_config = artifact.config
    manifest = artifact.manifest
    graph = ir.load(artifact.folder / "model.onnx").graph
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    places = {
        getattr(tensor, "offset", name): name for name, tensor in tensors.items()
    }  # a tied head is its embedding's bytes
    sizes = {name: tensors[name].nbytes for name in places.values()}  # type: ignore[union-attr]
    if config == "plain":
        gather = next(node for node in graph if node.op_type.startswith("Gather"))
        table = [value.name for value in gather.inputs if value is not None and value.name in sizes]
        sizes |= {name: sizes[name] / model_config.vocab_size for name in table if name is not None}
    weights = step_bytes(manifest, model_config, 1, depth=0) - StateSpec.of(model_config).nbytes(1, 0)
    assert weights == pytest.approx(sum(sizes.values()), rel=0.05)  # alignment; the embedding's repeated int8 scales
    assert manifest.files[manifest.weights_file][1] == max(size for _, size in manifest.files.values())
    per_token = 2 * (2 if kv == "fp16" else 4) * model_config.num_hidden_layers * model_config.kv_dim
    assert (
        step_bytes(manifest, model_config, 3, depth=100) - step_bytes(manifest, model_config, 3, depth=0)
        == 3 * 100 * per_token
    )


def test_state_bytes_are_those_of_the_arrays(tiny: Path) -> None:
    from h1export.model.falcon_h1.config import FalconH1Config

    states = StateSpec.of(FalconH1Config.load(tiny))
    assert states.nbytes(2, 7) == sum(array.nbytes for array in states.zeros(2, 7).values())


def test_jobs_take_turns() -> None:
    order: list[str] = []

    def job(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({"a": partial(job, "a"), "b": partial(job, "b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_bandwidth_reads_all_of_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    largest = np.max
    monkeypatch.setattr(np, "max", lambda part: seen.append(part.nbytes) or largest(part))
    assert read_bandwidth(3)() > 0
    assert sum(seen) == READ_BYTES
    assert len(seen) == 3


def test_the_best_read_counts_and_a_disturbed_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted slow moment: once it changes nothing, and all the time it is said."""
    rates = iter((9e9, 10e9, 9.5e9, 2e9, 10e9, 2e9, 3e9, 10e9, 2e9, 2e9))
    monkeypatch.setattr(memory_traffic, "read_bandwidth", lambda threads: lambda: next(rates))
    turn = Turn(1)
    assert turn() == 10e9
    once = Bandwidth.of(turn.reads, [8e9])
    assert (once.best, once.typical, once.reads, once.is_quiet) == (10e9, 9.5e9, READS, True)
    assert turn() == 10e9
    often = Bandwidth.of(turn.reads[READS:], [8e9])
    assert (often.best, often.is_quiet) == (10e9, False)


def test_a_decode_that_reads_faster_is_the_bandwidth() -> None:
    found = Bandwidth.of([4e9, 5e9, 4e9], [3e9, 18e9])
    assert (found.best, found.read, found.is_quiet) == (18e9, 5e9, False)


@settings(max_examples=50, deadline=None)
@given(
    reads=st.lists(st.floats(1e6, 1e12), min_size=1, max_size=30),
    decodes=st.lists(st.floats(1e6, 1e12), min_size=1, max_size=9),
)
def test_no_share_is_above_one(reads: list[float], decodes: list[float]) -> None:
    assert estimate(decodes).median / Bandwidth.of(reads, decodes).best <= 1


@pytest.mark.parametrize("disturbed", [False, True])
def test_the_table_says_whether_the_machine_was_quiet(disturbed: bool) -> None:
    bandwidth = Bandwidth.of([10e9] + ([3e9] * 3 if disturbed else [9e9] * 3), [5e9])
    report = BenchReport(BenchOptions(), {}, {2: bandwidth}, measured=(), speeds=(), left_out=())
    notes = "\n".join(bench_tables(report)[-1].notes)
    assert "read bandwidth 10.0 GB/s with threads 2: the best of 4 reads" in notes
    assert ("the machine was not quiet" in notes) == disturbed


@pytest.mark.ort
def test_a_sequence_is_brought_to_its_depth_once(tiny: Path, build: Build) -> None:
    runner = load_runner(build(tiny, "int4", accuracy_level=4), threads=1)
    calls: list[tuple[int, int]] = []

    class Counted:
        config = runner.config
        limits = runner.limits
        provenance = runner.provenance

        def start(self, batch: int, capacity: int) -> Counted:
            self.inner = runner.start(batch, capacity)
            return self

        @property
        def length(self) -> int:
            return self.inner.length

        def append(self, ids: np.ndarray[tuple[int, int], np.dtype[np.int64]], *, keep: int) -> None:
            calls.append((self.inner.length, ids.shape[1]))
            assert self.inner.append(ids, keep=keep).shape[1] == 1  # what generation computes is timed

    model = RunnerModel(Counted(), steps=3)  # type: ignore[arg-type]
    assert model.speed(Timing(Phase.DECODE, 520, 2)) > 0
    assert calls == [(0, 512), (512, 8), (520, 1), (521, 1), (522, 1)]
    calls.clear()
    model.speed(Timing(Phase.DECODE, 520, 2))
    model.speed(Timing(Phase.DECODE, 0))
    model.speed(Timing(Phase.DECODE, 0))
    model.speed(Timing(Phase.PREFILL, 9))
    assert calls == [(523, 1), (524, 1), (525, 1), *[(0, 1), (1, 1), (2, 1)] * 2, (0, 9)]
    calls.clear()
    for _ in range(3):  # an eighth of 40 has room for one timing of 3 and no more
        model.speed(Timing(Phase.DECODE, 40))
    assert calls == [(0, 40), (40, 1), (41, 1), (42, 1)] * 3


@pytest.mark.ort
def test_two_artifacts_are_measured_in_turns(tiny: Path, build: Build) -> None:
    artifacts = [build(tiny, "int4", accuracy_level=4), build(tiny)]
    options = BenchOptions(depths=(0, 16), prefills=(32,), threads=(1,), batches=(1, 2), repeats=2, steps=2)
    report = bench_artifact(*(artifact.folder for artifact in artifacts), None, options=options)
    assert [(speed.model, speed.timing.key) for speed in report.speeds] == [
        (subject, what + batch)
        for what in ("decode at 0", "decode at 16", "prefill 32")
        for batch in ("", ", batch 2")
        for subject in (0, 1)
    ]
    for speed in report.speeds:
        assert len(speed.samples) == 2
        assert (speed.ratio is not None) == (speed.model == 0)
        if speed.step_bytes is not None:
            assert speed.step_bytes == step_bytes(
                artifacts[speed.model].manifest, artifacts[speed.model].config, speed.batch, depth=speed.tokens
            )
            assert speed.bandwidth_share == pytest.approx(
                speed.step_bytes * speed.tokens_per_second.median / speed.batch / report.bandwidth[1].best
            )
            assert speed.bandwidth_share <= 1
    int4, full = report.measured
    assert int4.peak_bytes[1] > artifacts[0].manifest.files["model.onnx.data"][1]
    assert (int4.built_as["quant"], int4.built_as["accuracy_level"], full.built_as["quant"]) == ("int4", 4, "none")
    assert int4.kernels.startswith("h1export in onnxruntime ")


@pytest.mark.ort
@pytest.mark.slow
def test_the_reference_is_measured_in_turns(make_checkpoint: Callable[..., Path], build: Build, tiny: Path) -> None:
    checkpoint = make_checkpoint()
    artifact = build(checkpoint, "int4")
    options = BenchOptions((0, 8), (16,), (1,), batches=(2,), repeats=2, steps=2)
    report = bench_artifact(artifact.folder, None, checkpoint, options=options)
    ours, reference = report.measured
    assert (ours.target, reference.target, reference.built_as["weights"]) == (
        "ort",
        "transformers",
        "the artifact's, dequantised",
    )
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))  # bfloat16, and a header
    assert reference.weight_bytes == pytest.approx(2 * stored, rel=0.05)
    assert [speed.ratio is not None for speed in report.speeds] == [True, False] * 3
    with pytest.raises(H1ExportError, match="was not built from"):
        bench_artifact(artifact.folder, None, tiny, options=options)


def test_a_reference_times_what_it_is_asked(make_checkpoint: Callable[..., Path]) -> None:
    reference = Reference(make_checkpoint())
    ids = np.random.default_rng(0).integers(0, 259, (2, 9))
    session = reference.start(2, 0)
    logits = [session.append(part)[:, -1] for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])]
    for row, found in zip(ids, logits[-1], strict=True):  # without time_step_limit and pads, its cache is right
        np.testing.assert_allclose(found, reference.full(row)[0][-1], atol=1e-4)
    assert session.length == 9


@pytest.mark.parametrize(
    ("limits", "timing", "reason"),
    [
        (Limits(), Timing(Phase.DECODE, 9999, 64), ""),
        (Limits(max_batch=1), Timing(Phase.PREFILL, 8, 2), "takes 1 sequences at a time"),
        (Limits(max_context=64), Timing(Phase.PREFILL, 64), ""),
        (Limits(max_context=64), Timing(Phase.PREFILL, 65), "has room for 64 tokens"),
        (Limits(max_context=64), Timing(Phase.DECODE, 32), ""),
        (Limits(max_context=64), Timing(Phase.DECODE, 33), "has room for 64 tokens"),
    ],
)
def test_what_a_runner_cannot_do_is_left_out(limits: Limits, timing: Timing, reason: str) -> None:
    assert timing.refused(limits, steps=32) == reason


def test_a_workers_error_is_its_parents(tmp_path: Path) -> None:
    makes: dict[str, Any] = {
        "no manifest.json": partial(Artifact.open, tmp_path),
        "its process ended with code 3": partial(os._exit, 3),
    }
    for message, make in makes.items():
        with pytest.raises(H1ExportError, match=message):
            WorkerProcess(make)


def test_a_worker_imports_nothing_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a stranger may have modules of the names that a new process imports first."""
    for name in ("multiprocessing", "encodings", "json", "numpy", "h1export", "sitecustomize"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    monkeypatch.chdir(tmp_path)
    for before in ("", "1"):
        monkeypatch.setenv("PYTHONSAFEPATH", before)
        with pytest.raises(H1ExportError, match=r"no manifest\.json"):
            WorkerProcess(partial(Artifact.open, tmp_path))
        assert not (tmp_path / "ran").exists()
        assert os.environ["PYTHONSAFEPATH"] == before
