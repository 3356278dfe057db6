"""The graph of --graph portable in OpenVINO: exact in float32, its rounding explained, everything else refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from runner_errors import worst
from saved_sessions import CHECKS as SESSIONS
from saved_sessions import check_save_and_restore
from threaded_runners import CHECKS as THREADED

import h1export
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.targets import all_kernels, get_target, options_class, target_infos
from h1export.targets.onnxruntime import openvino_runner, openvino_sdk
from h1export.targets.onnxruntime.options import Graph
from h1export.targets.options import KERNELS
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validate

Build = Callable[..., Artifact]
OPENVINO = openvino_sdk.NAME
EXACT = 1e-5  # of the range
ROUNDED = 8e-2  # activations in 8 bits
STATES = 1e-4  # OpenVINO's SoftPlus is 1.1e-6 off, which is a thousandth of a time step of 0.001
CALLS = (40, 1, 1, 23, 1, 3)  # prefills and decodes, in any order
NO_INT8 = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
NO_BF16 = {"INFERENCE_PRECISION_HINT": "f32"}
CACHE_IN_INT8 = {"KV_CACHE_PRECISION": "u8"}


@pytest.fixture(scope="module")
def runner(make_checkpoint: Callable[..., Path], build: Build) -> Any:
    return load_runner(build(make_checkpoint(), "int4", graph="portable"), 1, kernels=OPENVINO)


def test_validate_passes(make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint("everything")
    artifact = build(checkpoint, "int4", graph="portable")
    found = load_runner(artifact, 1, kernels=OPENVINO)
    assert found.provenance.float32  # accuracy level 0
    options = ValidateOptions(pairs=0, quick=True)
    report = validate(artifact, found, found, checkpoint=checkpoint, options=options, progress=SILENT)
    assert report.passed, report.to_json()
    rows = [row for row in report.rows if row.comparison == "stored" and row.compares_outputs]
    assert rows
    assert max(max(row.figures["logits"], row.figures["states"]) for row in rows) <= EXACT


def test_padded_batches_are_those_of_onnx_runtime(
    runner: Any, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    """Prefill, decode with carried states, and several tokens after a past, of rows with pads and without."""
    theirs: Any = load_runner(build(make_checkpoint(), "int4", graph="portable"), 1)
    ids = np.random.default_rng(0).integers(0, 259, (3, 60))
    mask = np.ones_like(ids)
    mask[1, :5], mask[2, :29] = 0, 0
    answers = []
    for one in (runner, theirs):
        states, end, found = one.initial(3), 0, []
        for tokens in (30, 1, 1, 25, 3):
            end += tokens
            logits, states = one.step(ids[:, end - tokens : end], mask[:, :end], states)
            found.append(logits)
        answers.append((np.concatenate(found, axis=1)[mask == 1], one.snapshot(states)))
    (found, states), (expected, truth) = answers
    assert np.abs(found - expected).max() <= EXACT * np.ptp(expected)
    for key, state in truth.items():
        assert np.abs(states[key] - state).max() <= STATES * np.ptp(state), key


@pytest.mark.parametrize(
    ("name", "quant"),
    [("norm_before_gate_three_groups", "none"), ("dt_lower_limit", "int8"), ("odd_sizes", "int4"), ("tied", "int4")],
)
def test_models_are_exact(name: str, quant: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(name)
    found: Any = load_runner(build(checkpoint, quant, graph="portable"), 1, kernels=OPENVINO)
    reference = Reference(checkpoint)
    reference.hold(found.stored_weights())
    logits, states = worst(found, reference, CALLS)
    assert logits <= EXACT
    assert states <= STATES


def test_what_openvino_rounds_by_itself(tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with integers round activations to int8 in groups, and a CPU with bf16 rounds the rest to bf16.

    Neither setting alone gives float32, both do, and ACCURACY is both. The precision of OpenVINO's own cache of keys
    and values plays no part, because this graph has its states as inputs and outputs.
    """
    artifact = build(tiny, "int4", graph="portable", accuracy_level=4)
    reference = Reference(tiny)
    reference.hold(load_runner(artifact, 1).stored_weights())

    def measured(settings: Mapping[str, str]) -> tuple[float, float]:
        mode = openvino_runner.MODES[False]
        monkeypatch.setitem(openvino_runner.MODES, False, {**mode, **settings})
        found: Any = load_runner(artifact, 1, kernels=OPENVINO)
        monkeypatch.setitem(openvino_runner.MODES, False, mode)
        assert not found.provenance.float32
        return worst(found, reference, CALLS)

    exact: Any = load_runner(artifact, 1, True, kernels=OPENVINO)
    assert exact.provenance.float32
    both = {**NO_INT8, **NO_BF16}
    for logits, states in (worst(exact, reference, CALLS), measured(both), measured({**both, **CACHE_IN_INT8})):
        assert logits <= EXACT
        assert states <= STATES
    can = openvino_sdk.openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for settings, rounds in (({}, True), (NO_BF16, True), (NO_INT8, "BF16" in can)):
        logits, _ = measured(settings)
        assert logits <= ROUNDED, settings
        assert (logits > 1e-3) == rounds, settings


def test_softplus_of_openvino_is_what_states_are_off_by() -> None:
    """Absolutely, it is right; relative to a small time step, it is not."""
    ov = openvino_sdk.openvino()
    x = ov.opset13.parameter([-1], np.float32)
    compiled = ov.Core().compile_model(ov.Model([ov.opset13.softplus(x)], [x]), "CPU", openvino_runner.MODES[True])
    values = np.linspace(-9, -5, 4001, dtype=np.float32)
    truth = np.log1p(np.exp(values.astype(np.float64)))
    error = np.abs(compiled([values])[0] - truth)
    assert error.max() <= 2e-6
    assert (error / truth).max() <= 2e-2


def test_probes_are_those_of_onnx_runtime(runner: Any, make_checkpoint: Callable[..., Path], build: Build) -> None:
    theirs: Any = load_runner(build(make_checkpoint(), "int4", graph="portable"), 1)
    ids = np.arange(22).reshape(11, 2).T  # not contiguous
    mask = np.ones((2, 11), np.int64)
    found, expected = (one.observe(ids, mask, one.initial(2))[2] for one in (runner, theirs))
    assert found.keys() == expected.keys()
    for probe, value in expected.items():
        assert np.abs(found[probe] - value).max() <= EXACT * np.ptp(value), probe


@pytest.mark.parametrize("rows", [1, 3])
def test_save_and_restore(runner: Any, rows: int) -> None:
    check_save_and_restore(runner, rows)


@pytest.mark.parametrize("check", SESSIONS)
def test_sessions(check: str, runner: Any) -> None:
    SESSIONS[check](runner)


@pytest.mark.parametrize("check", THREADED)
def test_sharing(check: str, runner: Any) -> None:
    THREADED[check](runner)


def test_results_are_the_callers_own(runner: Any) -> None:
    ids = np.arange(6)[None]
    mask = np.ones((1, 6), np.int64)
    first, _ = runner.step(ids, mask, runner.initial(1))
    before = first.copy()
    runner.step(ids + 9, mask, runner.initial(1))
    assert np.array_equal(first, before)


def test_names_of_another_layout(make_checkpoint: Callable[..., Path], build: Build, runner: Any) -> None:
    artifact = build(make_checkpoint(), "int4", graph="portable", layout="transformers.js")
    found: Any = load_runner(artifact, 1, kernels=OPENVINO)
    ids = np.arange(7)[None]
    mask = np.ones((1, 7), np.int64)
    assert np.array_equal(*(one.step(ids, mask, one.initial(1))[0] for one in (found, runner)))


def test_load_takes_its_name(tiny: Path, build: Build) -> None:
    found = h1export.load(build(tiny, "int4", graph="portable").folder, 1, runtime=OPENVINO)
    assert found.provenance.kernels == f"openvino {openvino_sdk.version()}"


@pytest.mark.parametrize("graph", [graph for graph in get_args(Graph) if graph != openvino_runner.GRAPH])
def test_a_graph_with_other_operators_is_refused_by_name(graph: str, tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", graph=graph)
    with pytest.raises(H1ExportError, match=rf"--graph {graph} has operators of ONNX Runtime's own.*--graph portable"):
        load_runner(artifact, kernels=OPENVINO)


@pytest.mark.parametrize("target", [name for name, info in target_infos().items() if not info.other_runtimes])
def test_artifacts_of_other_targets_are_refused(target: str, tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", graph="portable")
    other = replace(artifact.manifest, target=target, options=asdict(options_class(target)()))
    with pytest.raises(
        H1ExportError, match=rf"--target {target} does not run in it; one of auto, native, compiled, stock"
    ):
        load_runner(Artifact(artifact.folder, other), kernels=OPENVINO)


def test_unknown_kernels_are_refused(tiny: Path, build: Build) -> None:
    assert all_kernels() == (*KERNELS, OPENVINO)
    with pytest.raises(
        H1ExportError, match="kernels tensorrt: is unknown; one of auto, native, compiled, stock, openvino"
    ):
        load_runner(build(tiny, "int4", graph="portable"), kernels="tensorrt")


def test_a_missing_package_is_named(tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    artifact = build(tiny, "int4", graph="portable")
    monkeypatch.setattr(openvino_sdk, "import_module", missing)
    with pytest.raises(H1ExportError, match=r"openvino: is not installed; pip install 'h1export\[openvino\]'"):
        load_runner(artifact, kernels=OPENVINO)
    findings = {one.name: one for one in get_target("ort").examine(artifact, build=False, progress=SILENT)}
    assert findings["OpenVINO"].passed is None  # ONNX Runtime runs it as well
    assert findings["ONNX Runtime"].passed


def test_doctor_says_that_openvino_can_run_it(tiny: Path, build: Build) -> None:
    def findings(graph: str) -> dict[str, Any]:
        artifact = build(tiny, "int4", graph=graph)
        return {one.name: one for one in get_target("ort").examine(artifact, build=False, progress=SILENT)}

    assert findings("portable")["OpenVINO"].passed
    assert "OpenVINO" not in findings("cpu")


def test_a_damaged_graph_is_one_line(tiny: Path, build: Build, tmp_path: Path) -> None:
    artifact = build(tiny, "int4", graph="portable")
    for name in ("config.json", "model.onnx"):
        shutil.copy(artifact.folder / name, tmp_path)
    with pytest.raises(H1ExportError, match="OpenVINO cannot load it") as caught:  # its weights are not there
        load_runner(Artifact(tmp_path, artifact.manifest), kernels=OPENVINO)
    assert "\n" not in str(caught.value)
