"""What the gate counts and measures, with something planted for each figure to be found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.report.checks import Phase
from h1export.report.report import Verdict
from h1export.runtime.runner import Limits, Provenance, Runner
from h1export.targets import get_target
from h1export.validate.speed.decision import decide_all
from h1export.validate.speed.gate_checks import check_label
from h1export.validate.speed.gate_file import Baseline, Gate, Limit
from h1export.validate.speed.regression import BEST_OF, ModelPair, counted, counted_checks
from h1export.validate.speed.worker import RunnerModel, Timing

Build = Callable[..., Artifact]
DECODE = Timing(Phase.DECODE, 0)
PREFILL = Timing(Phase.PREFILL, 64)
GATE = Gate("ort", "int4", (Limit(DECODE), Limit(PREFILL)))
BASE = Baseline(
    "m",
    {"model.onnx": {"Add": 4, "Mul": 2}},
    {"model.onnx": 100, "README.md": 7},
    step_bytes={"decode at 0": 50},
    spills={"decode sm_80": 0, "chunk_scan sm_80": 16},
)


def verdicts(now: Baseline, gate: Gate = GATE) -> dict[str, tuple[Verdict, str]]:
    return {check_label(check): (check.verdict, check.note) for check in counted_checks(now, BASE, gate)}


def test_the_same_figures_pass() -> None:
    assert set(verdicts(BASE).values()) == {(Verdict.PASS, "")}
    assert list(verdicts(BASE)) == ["nodes model.onnx", "file bytes", "bytes a step reads", "kernel spills"]


@pytest.mark.parametrize(
    ("change", "name", "note"),
    [
        ({"nodes": {"model.onnx": {"Add": 5, "Mul": 2}}}, "nodes model.onnx", "Add 5, was 4"),
        ({"nodes": {"model.onnx": {"Add": 3, "Cast": 1}}}, "nodes model.onnx", "Cast 1, was 0"),  # fewer in all
        ({"nodes": {**BASE.nodes, "model.native.onnx": {"Add": 1}}}, "nodes model.native.onnx", "Add 1, was 0"),
        ({"files": {"model.onnx": 101, "README.md": 1}}, "file bytes", "model.onnx 101, was 100"),
        ({"files": {**BASE.files, "more": 1}}, "file bytes", "more 1, was 0"),
        ({"step_bytes": {"decode at 0": 51}}, "bytes a step reads", "decode at 0 51, was 50"),
        ({"spills": {"decode sm_80": 4, "chunk_scan sm_80": 0}}, "kernel spills", "decode sm_80 4, was 0"),
        (
            {"spills": {"decode sm_86": 8}},
            "kernel spills",
            "decode sm_86 8, was 0",
        ),  # fewer in all, but of a new kernel
    ],
)
def test_more_of_anything_fails(change: dict[str, Any], name: str, note: str) -> None:
    found = verdicts(replace(BASE, **change))
    assert found.pop(name) == (Verdict.FAIL, note)
    assert {verdict for verdict, _ in found.values()} == {Verdict.PASS}


def test_factors_leave_room_and_less_is_said() -> None:
    more = replace(BASE, files={"model.onnx": 101, "README.md": 5})
    assert verdicts(more, replace(GATE, bytes=1.01))["file bytes"] == (
        Verdict.PASS,
        "less than the baseline: README.md 5, was 7",
    )


def test_another_model_or_timing_has_no_baseline() -> None:
    for now, message in (
        (replace(BASE, model="n"), "another model"),
        (replace(BASE, step_bytes={"decode at 9": 1}), "for decode at 9"),
    ):
        with pytest.raises(H1ExportError, match=rf"{message}.*--write-baseline"):
            verdicts(now)


@pytest.mark.ort
def test_operations_are_those_of_the_graphs(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", accuracy_level=4)
    found = get_target("ort").operations(artifact)
    graph = ir.load(artifact.folder / "model.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert found["model.onnx"]["com.microsoft.MatMulNBits"] == len(products) == 17
    assert found["model.native.onnx"]["h1export.SSMScan"] == artifact.config.num_hidden_layers
    now = counted(artifact, GATE, found)
    assert set(now.files) == set(artifact.manifest.files)
    assert list(now.step_bytes) == ["decode at 0"]


class Fake:
    """Speeds in the order of ``speeds``; ``log`` hears whose turn it was."""

    limits = Limits()
    provenance = Provenance(kernels="none")

    def __init__(self, name: str, speeds: list[float], log: list[str]) -> None:
        self._name = name
        self._speeds = iter(speeds)
        self._log = log

    def speed(self, timing: Timing) -> float:
        self._log.append(self._name)
        return next(self._speeds)


def test_a_pair_is_the_best_of_each_in_random_order() -> None:
    log: list[str] = []
    pair = ModelPair(Fake("a", [1, 9, 3] * 40, log), Fake("b", [2, 1, 3] * 40, log))
    assert {pair.speed(DECODE) for _ in range(40)} == {3.0}
    first = log[:: 2 * BEST_OF]
    assert set(first) == {"a", "b"}  # all alike: once in 2 ** 39
    assert all(len(set(log[i : i + BEST_OF])) == 1 for i in range(0, len(log), BEST_OF))


@pytest.fixture
def pinned() -> Iterator[None]:
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    host.pin(1)
    yield
    if before is not None:
        os.sched_setaffinity(0, before)


@pytest.mark.ort
@pytest.mark.usefixtures("pinned")
def test_a_planted_slowdown_fails_and_the_same_build_passes(
    tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from slowed import Slowed

    artifact = build(tiny, "int4", accuracy_level=4)
    runner, other = (load_runner(artifact, threads=1) for _ in range(2))

    def timed(model: Runner[Any]) -> RunnerModel:
        return RunnerModel(model, 8, time.process_time)

    for factor, wanted in (
        (1.0, Verdict.PASS),
        (1.6, Verdict.FAIL),
    ):  # 1.3, by nox -s gate: in a test neighbours may take half the cache
        pair = ModelPair(timed(Slowed(runner, factor)), timed(other))
        found = decide_all(lambda timing, pair=pair: 1 / pair.speed(timing), {DECODE: 1.25, PREFILL: 1.25}, 128)
        assert {timing: decision.verdict for timing, decision in found.items()} == dict.fromkeys(found, wanted), found
