"""The graph of --graph cuda with bf16 activations, as far as a CPU can judge it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cuda_graph import BF16, EXACT, HALF, assert_kernels, dtypes, load, rows, worst
from onnx import TensorProto, helper

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.load import load_runner
from h1export.progress import SILENT
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.report.report import Report
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import bfloat16, changed_graph
from h1export.targets.onnxruntime.float32_graph import float32_graph
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.onnxruntime.variants import CPU
from h1export.validate.accuracy import tolerances
from h1export.validate.accuracy.run import ValidateOptions, validate

Build = Callable[..., Artifact]
QUANTS = ("none", "int8", "int4")
# bf16 has 8 times the rounding of fp16, whose drift on these depths is below 5e-3
ROUNDED = 4e-2


def bf16(build: Build, checkpoint: Path, quant: str) -> Artifact:
    return build(checkpoint, quant, graph="cuda", activations="bf16")


@pytest.mark.parametrize("quant", QUANTS)
def test_every_node_has_a_cuda_kernel_of_its_dtypes(
    quant: str, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    for checkpoint in (make_checkpoint("everything"), make_checkpoint("dt_limits")):
        model = load(bf16(build, checkpoint, quant))
        assert_kernels(model)
        found = dtypes(model)
        halves = {name for name, dtype in found.items() if dtype == HALF}
        scales = {tensor.name for tensor in model.graph.initializer if tensor.data_type == HALF}
        assert halves == scales  # fp16 scales and nothing else
        assert bool(scales) == (quant != "none")
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                assert found[node.input[0]] == found[node.input[2]] == TensorProto.FLOAT
            if node.op_type in ("FusedMatMul", "GroupQueryAttention", "CausalConvWithState"):
                assert found[node.input[0]] == BF16


@pytest.mark.parametrize("quant", QUANTS)
def test_strict_shape_inference_passes(quant: str, tiny: Path, build: Build) -> None:
    model = onnx.load(bf16(build, tiny, quant).folder / "model.onnx")
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))


def test_states_are_bf16_but_for_the_recurrent_one(tiny: Path, build: Build) -> None:
    artifact = bf16(build, tiny, "int4")
    for side in (artifact.manifest.inputs, artifact.manifest.outputs):
        for name, (dtype, _) in side.items():
            if name.startswith(("past", "present")):
                assert dtype == ("FLOAT" if name.endswith("recurrent_state") else "BFLOAT16"), name
    assert artifact.manifest.outputs["logits"][0] == "FLOAT"
    assert OrtOptions.read(artifact).activations == "bf16"
    assert "are bfloat16" in (artifact.folder / "README.md").read_text()


@pytest.mark.parametrize("quant", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_integers_are_exact_in_float32_arithmetic(quant: str, tiny: Path, build: Build) -> None:
    artifact = bf16(build, tiny, quant)
    assert worst(rows(artifact, tiny, load_runner(artifact, float32=True), "stored")) <= EXACT


def test_the_artifact_holds_the_rules_integers_and_scales_bit_for_bit(tiny: Path, build: Build) -> None:
    artifact = bf16(build, tiny, "int4")
    stored: Any = load_runner(artifact, float32=True).stored_weights()
    store = WeightStore.open(tiny, artifact.config)
    for weight in artifact.manifest.weights:
        for part in weight.parts:
            count = store.shape(part.tensor)[0]
            precision = Precision(weight.bits, weight.group_size)
            truth = quantize_rows(store.rows(part.tensor, 0, count), precision, part.multiplier.rows(count))
            found = stored.quantized(part.tensor)
            assert np.array_equal(found.codes, truth.codes), part.tensor
            assert np.array_equal(found.scales, truth.scales), part.tensor


def rounded(model: ir.Model, *, weights: bool) -> ir.Model:
    """The graph in float32, every value rounded to bf16 where the graph has bf16."""
    kinds = dtypes(ir.to_proto(model))
    proto = ir.to_proto(float32_graph(model, weights=weights))
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        names = [name for name in node.output if kinds.get(name) == BF16]
        node.output[:] = [f"{name}.exact" if name in names else name for name in node.output]
        proto.graph.node.append(node)
        for name in names:
            bits = helper.make_node("Cast", [f"{name}.exact"], [f"{name}.bits"], to=BF16)
            back = helper.make_node("Cast", [f"{name}.bits"], [name], to=TensorProto.FLOAT)
            proto.graph.node.extend((bits, back))
    return ir.from_proto(proto)


@pytest.mark.parametrize("quant", QUANTS)
def test_bf16_activations_drift_as_far_as_bf16_does(
    quant: str, tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = bf16(build, tiny, quant)
    exact = load_runner(artifact, float32=True)
    monkeypatch.setattr(changed_graph, "float32_graph", rounded)
    twin = load_runner(artifact, float32=True)
    ids = np.random.default_rng(0).integers(0, exact.config.vocab_size, (2, 24))
    found = []
    for runner in (exact, twin):
        first, states = runner.step(ids[:, :20], np.ones((2, 20), np.int64), runner.initial(2))
        second, _ = runner.step(ids[:, 20:21], np.ones((2, 21), np.int64), states)
        found.append(np.concatenate([first, second], axis=1))
    drift = np.abs(found[0] - found[1]).max() / np.abs(found[0]).max()
    print(f"{quant}: drift {drift:.1e}")
    assert 1e-3 < drift < ROUNDED


def test_the_tolerances_of_bf16_hold_and_exclude_a_planted_fault(
    tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16's do not hold: bf16 rounds 8 times as far. Without quantisation there is nothing but these tolerances."""
    artifact = bf16(build, tiny, "none")
    monkeypatch.setattr(changed_graph, "float32_graph", rounded)
    twin = load_runner(artifact, float32=True)
    step = OnnxRuntimeRunner.step
    monkeypatch.setattr(OnnxRuntimeRunner, "provenance", replace(twin.provenance, float32=False))

    def judged() -> Report:
        options = ValidateOptions(pairs=0, prompts=0, quick=True)
        return validate(artifact, twin, twin, checkpoint=tiny, options=options, progress=SILENT)

    report = judged()
    assert report.passed, report.to_json()
    cases = [row for row in report.rows if row.compares_outputs]
    assert max(row.figures["logits"] / tolerances.HALF["logits"] for row in cases) > 0.5
    assert all(row.tolerances["logits"] == tolerances.BRAIN["logits"] for row in cases)

    def forgetful(self: Any, ids: Any, mask: Any, states: Any) -> Any:
        faded = {name: (state * 0.9).astype(state.dtype) for name, state in states.items() if "recurrent" in name}
        return step(self, ids, mask, {**states, **faded})

    monkeypatch.setattr(OnnxRuntimeRunner, "step", forgetful)
    assert not judged().passed


def test_bf16_arrays_go_in_and_out_by_their_bits() -> None:
    """The runner's way of running a session, on a graph whose bf16 kernels the CPU has: Cast."""
    shape = ["n", 3]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT), helper.make_node("Cast", ["y"], ["z"], to=BF16)],
        "casts",
        [helper.make_tensor_value_info("x", BF16, shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("z", BF16, shape),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = sdk.onnxruntime().InferenceSession(model.SerializeToString(), providers=[CPU])
    for count in (0, 5):
        x = np.random.default_rng(0).standard_normal((count, 3)).astype(ml_dtypes.bfloat16)
        y, z = bfloat16.run(session, ["y", "z"], {"x": x})
        assert y.dtype == np.float32
        assert np.array_equal(y, x.astype(np.float32))
        assert z.dtype == ml_dtypes.bfloat16
        assert np.array_equal(z.view(np.uint16), x.view(np.uint16))


def test_a_manifest_of_before_the_option_means_fp16(tiny: Path, build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(build(tiny, "int4", graph="cuda").folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["options"]["activations"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert OrtOptions.read(Artifact.open(folder)) == OrtOptions(graph="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
def test_cuda_runs_bf16_states(quant: str, tiny: Path, build: Build) -> None:
    artifact = bf16(build, tiny, quant)
    exact, shipped = load_runner(artifact, float32=True), load_runner(artifact)
    ids = np.random.default_rng(0).integers(0, exact.config.vocab_size, (1, 21))
    mask = np.ones_like(ids)
    expected, _ = exact.step(ids, mask, exact.initial(1))
    found, states = shipped.step(ids, mask, shipped.initial(1))
    assert {state.dtype for state in states.values()} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    in_place = shipped.start(1, 32).append(ids)
    for logits in (found, in_place):
        assert np.abs(logits - expected).max() < ROUNDED * np.abs(expected).max()
