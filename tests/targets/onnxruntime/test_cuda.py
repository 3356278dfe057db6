"""The graph of --graph cuda, as far as a CPU can judge it; tests marked gpu are for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_graph import EXACT, assert_kernels, load, rows, worst

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.graphs.verify import LEGAL_OPS
from h1export.progress import SILENT
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime.emit import cuda
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.variants import CPU, GRAPH_VARIANTS
from h1export.validate.accuracy.run import ValidateOptions, validate

# fp16 has 5e-4 for a product; a layer has some ten in a row, whose errors add up like their root, of 4 layers
ROUNDED = 5e-3

Build = Callable[..., Artifact]


def test_the_table_is_the_legal_vocabulary() -> None:
    assert set(cuda.TABLE) == LEGAL_OPS


def test_every_node_has_a_cuda_kernel_of_its_dtypes(checkpoint: Path, build: Build) -> None:
    assert_kernels(load(build(checkpoint, "int4", graph="cuda")))


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_so_it_has_in_other_precisions(quant: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    odd = {"hidden_size": 100, "num_attention_heads": 2, "intermediate_size": 90}  # int8 in blocks that pad the last
    for checkpoint in (make_checkpoint("everything"), make_checkpoint("plain", **odd)):
        assert_kernels(load(build(checkpoint, quant, graph="cuda")))


def test_strict_shape_inference_passes(tiny: Path, build: Build) -> None:
    model = onnx.load(build(tiny, "int4", graph="cuda").folder / "model.onnx")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred)
    assert inferred.graph.value_info


def test_states_are_half_but_for_the_recurrent_one(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", graph="cuda")
    for side in (artifact.manifest.inputs, artifact.manifest.outputs):
        for name, (dtype, _) in side.items():
            if name.startswith(("past", "present")):
                assert dtype == ("FLOAT" if name.endswith("recurrent_state") else "FLOAT16"), name
    assert artifact.manifest.outputs["logits"][0] == "FLOAT"


def test_projections_of_one_input_are_one_product(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", graph="cuda")
    products = [node for node in load(artifact).graph.node if node.op_type == "MatMulNBits"]
    assert (
        len(products) == 5 * artifact.config.num_hidden_layers + 1
    )  # in_proj with q, k and v; out_proj; o_proj; gate with up; down


def on_the_cpu(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The graph as it ships, fp16 and all, where onnxruntime's CPU provider stands in for CUDA's."""
    with monkeypatch.context() as patch:
        patch.setitem(GRAPH_VARIANTS, "cuda", replace(GRAPH_VARIANTS["cuda"], provider=CPU))
        return load_runner(artifact)


def test_int4_is_exact_in_float32_arithmetic_for_every_switch(checkpoint: Path, build: Build) -> None:
    artifact = build(checkpoint, "int4", graph="cuda")
    exact = load_runner(artifact, float32=True)
    assert exact.provenance.float32
    assert worst(rows(artifact, checkpoint, exact, "stored")) <= EXACT


def test_int8_takes_widths_that_no_block_divides(make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint("plain", hidden_size=100, num_attention_heads=2, intermediate_size=90)
    artifact = build(checkpoint, "int8", graph="cuda")
    assert worst(rows(artifact, checkpoint, load_runner(artifact, float32=True), "stored")) <= EXACT


@pytest.mark.parametrize("quant", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_fp16_activations_drift_little(quant: str, tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = build(tiny, quant, graph="cuda")
    shipped = on_the_cpu(artifact, monkeypatch)
    assert not shipped.provenance.float32
    assert 1e-4 < worst(rows(artifact, tiny, shipped, "drift")) < ROUNDED


@pytest.mark.parametrize("name", ["no_mup", "everything"])
def test_fp16_weights_are_close_to_the_checkpoint(
    name: str, make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without integers, weights are rounded once, and the report's gates are those of fp16."""
    checkpoint = make_checkpoint(name)
    artifact = build(checkpoint, graph="cuda")
    assert 1e-5 < worst(rows(artifact, checkpoint, on_the_cpu(artifact, monkeypatch), "source")) < ROUNDED


def test_the_artifact_holds_the_rules_integers_and_scales_bit_for_bit(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", graph="cuda")
    stored: Any = load_runner(artifact, float32=True).stored_weights()
    store = WeightStore.open(tiny, artifact.config)
    for weight in artifact.manifest.weights:
        for part in weight.parts:
            rows = store.shape(part.tensor)[0]
            truth = quantize_rows(
                store.rows(part.tensor, 0, rows), Precision(weight.bits, weight.group_size), part.multiplier.rows(rows)
            )
            found = stored.quantized(part.tensor)
            assert np.array_equal(found.codes, truth.codes), part.tensor
            assert np.array_equal(found.scales, truth.scales), part.tensor
    assert len(stored) == 2 + 9 * artifact.config.num_hidden_layers


def test_genai_is_told_to_use_cuda(tiny: Path, build: Build) -> None:
    assert (
        '"provider_options": [\n     {\n      "cuda": {}'
        in (build(tiny, "int4", graph="cuda").folder / "genai_config.json").read_text()
    )


def test_without_cuda_the_runner_says_so(tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = build(tiny, "int4", graph="cuda")
    ort = sdk.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        H1ExportError, match=r"CUDAExecutionProvider: this onnxruntime does not have it.*pip install 'h1export\[cuda\]'"
    ):
        load_runner(artifact)


def test_a_cuda_that_does_not_start_is_an_error_and_no_slow_success(
    tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime itself falls back to the CPU with a line in its log."""
    artifact = build(tiny, "int4", graph="cuda")
    ort = sdk.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    make = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, providers: make(model, options, providers=[CPU])
    )
    with pytest.raises(H1ExportError, match="could not start"):
        load_runner(artifact)


def test_levels_of_the_cpus_products_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        H1ExportError, match="--accuracy-level: 4 is not a level that the kernels of --graph cuda have; one of 0"
    ):
        build_artifact(tiny, "ort", tmp_path / "out", options=OrtOptions(accuracy_level=4, graph="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_validate_passes_on_cuda(quant: str, tiny: Path, build: Build) -> None:
    artifact = build(tiny, quant, graph="cuda")
    report = validate(
        artifact,
        load_runner(artifact),
        load_runner(artifact, float32=True),
        checkpoint=tiny,
        options=ValidateOptions(pairs=0),
        progress=SILENT,
    )
    assert report.passed, report.to_json()


@pytest.mark.gpu
def test_cuda_runs_every_switch(checkpoint: Path, build: Build) -> None:
    artifact = build(checkpoint, "int4", graph="cuda")
    assert worst(rows(artifact, checkpoint, load_runner(artifact), "drift")) < ROUNDED
