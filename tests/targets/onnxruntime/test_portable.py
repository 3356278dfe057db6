"""The graph of --graph portable: ONNX's own operators, the same integers, right wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import QuantScheme, build_artifact
from h1export.commands.load import load_runner
from h1export.graphs.verify import LEGAL_OPS
from h1export.model.falcon_h1.states import StateSpec
from h1export.progress import SILENT
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor
from h1export.targets.onnx import column_major, column_major_writer
from h1export.targets.onnx.builder import GraphBuilder
from h1export.targets.onnxruntime import read_back, state_layout
from h1export.targets.onnxruntime.emit import dequantize_linear, portable
from h1export.targets.onnxruntime.emit.chunked_scan import LENGTH, Chunks, chunked_scan
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.sizes import ScanSizes
from h1export.validate.accuracy.cases import cases
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validate

EXACT = 1e-5  # of the range; float32 leaves 2e-6 on these depths

Build = Callable[..., Artifact]


def assert_exact(artifact: Artifact, checkpoint: Path, against: str, *, quick: bool = False) -> None:
    """Every case of the harness passes, and is far inside its gate."""
    exact = load_runner(artifact, float32=True)
    options = ValidateOptions(pairs=0, quick=quick)
    report = validate(artifact, exact, exact, checkpoint=checkpoint, options=options, progress=SILENT)
    assert report.passed, report.to_json()
    rows = [row for row in report.rows if row.comparison == against and row.compares_outputs]
    assert len(rows) == (sum(case.quick for case in cases(artifact.config)) if quick else 8)
    assert max(max(row.figures["logits"], row.figures["states"]) for row in rows) <= EXACT


def load(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.folder / "model.onnx")


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.floats(MIN_SCALE, MAX_SCALE, width=16), st.floats(1e-6, 1e6))
def test_scales_come_back_bit_for_bit_whatever_the_multiplier(scale: float, multiplier: float) -> None:
    factor = np.array([multiplier], np.float32)
    tensor = QuantizedTensor(np.zeros((1, 64), np.int8), np.full((1, 2), scale, np.float16), factor)
    assert np.array_equal(read_back.unfolded_scales(dequantize_linear.folded_scales(tensor), factor), tensor.scales)


def test_the_table_is_the_legal_vocabulary() -> None:
    assert set(portable.TABLE) == LEGAL_OPS


@pytest.mark.parametrize(("quant", "opset", "ir_version"), [("none", 18, 8), ("int8", 19, 9), ("int4", 21, 10)])
def test_only_operators_of_onnx(
    quant: str, opset: int, ir_version: int, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    model = load(build(make_checkpoint("everything"), quant, graph="portable"))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == ir_version
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)  # with strict shape inference
    assert not {node.op_type for node in model.graph.node} & {"Loop", "Scan", "If"}


def test_float32_is_exact_for_every_switch(checkpoint: Path, build: Build) -> None:
    """A few cases for every switch; the graph with integers, which differs in its products alone, has all cases."""
    assert_exact(build(checkpoint, graph="portable"), checkpoint, "source", quick=True)


@pytest.mark.parametrize("name", ["plain", "tied", "odd_sizes", "everything"])
def test_int4_is_exact_against_its_own_weights(name: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(name)
    assert_exact(build(checkpoint, "int4", graph="portable"), checkpoint, "stored")


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_int8_takes_widths_that_no_block_divides(name: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(name, hidden_size=100, num_attention_heads=2, intermediate_size=90)
    assert_exact(build(checkpoint, "int8", graph="portable"), checkpoint, "stored")


def test_accuracy_level_is_that_of_the_kernel_onnxruntime_makes(tiny: Path, build: Build) -> None:
    ids = np.arange(2, 9)[None]
    mask = np.ones((1, 7), np.int64)
    logits = {}
    for level in (0, 4):
        runner: Any = load_runner(build(tiny, "int4", graph="portable", accuracy_level=level))
        assert runner.provenance.float32 == (level == 0)
        logits[level] = runner.step(ids, mask, runner.initial(1))[0]
    drift = np.abs(logits[4] - logits[0]).max() / np.ptp(logits[0])
    assert 1e-4 < drift < 0.08  # int8 activations cannot be exact


@pytest.mark.parametrize(
    ("name", "quant"), [("norm_before_gate_three_groups", "none"), ("tied", "int4"), ("dt_limits", "int8")]
)
def test_the_reference_evaluator_of_onnx_agrees(
    name: str, quant: str, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    """The specification's own, slow runtime: what needs more than it offers does not run anywhere."""
    checkpoint = make_checkpoint(name, num_hidden_layers=1)
    artifact = build(checkpoint, quant, graph="portable")
    evaluator = ReferenceEvaluator(load(artifact))
    config = artifact.config
    reference = Reference(checkpoint)
    reference.hold(load_runner(artifact).stored_weights())
    states = StateSpec.of(config)
    feeds = {t.past: state_layout.permute(t.kind, states.zeros(2)[t.key]) for t in states.tensors}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH + 9))
    pad = 3
    length = LENGTH + 9
    mask = np.ones_like(ids)
    mask[1, :pad] = 0
    found = []
    end = 0
    for tokens in (LENGTH + 5, 1, 3):  # more than a chunk, a decode step, several rows of several tokens after a past
        end += tokens
        answers = evaluator.run(
            None, {"input_ids": ids[:, end - tokens : end], "attention_mask": mask[:, :end], **feeds}
        )
        named = dict(zip(evaluator.output_names, answers, strict=True))
        found.append(named["logits"])
        feeds = {t.past: named[t.present] for t in states.tensors}
    assert end == length
    for row, start in ((0, 0), (1, pad)):
        truth, truth_states = reference.full(ids[row, start:])
        assert np.abs(np.concatenate(found, axis=1)[row, start:] - truth).max() <= EXACT * np.ptp(truth)
        for t in states.tensors:
            state = state_layout.permute(t.kind, feeds[t.past])[row]
            expected = truth_states[t.key]
            assert np.abs((state[:, start:] if t.kind.grows else state) - expected).max() <= EXACT * np.ptp(expected), (
                t.key
            )


@pytest.fixture(scope="module")
def scan_model() -> ort.InferenceSession:
    """The scan alone: 2 groups of 2 heads, d_head 3, d_state 5."""
    sizes = ScanSizes(4, 2, 3, d_state=5)
    b = GraphBuilder({"": 18})
    floats = ir.TensorType(ir.DataType.FLOAT)
    shapes = {
        "drive": ("b", "s", 12),
        "decay": ("b", "s", 4),
        "B": ("b", "s", 10),
        "C": ("b", "s", 10),
        "state": ("b", 4, 5, 3),
    }
    inputs = {name: ir.Value(name=name, shape=ir.Shape(shape), type=floats) for name, shape in shapes.items()}
    chunks = Chunks.of(b, b.op("Shape", inputs["decay"], start=1, end=2))
    results = chunked_scan(
        b,
        sizes,
        chunks,
        drive=inputs["drive"],
        log_decay=inputs["decay"],
        B=inputs["B"],
        C=inputs["C"],
        state=inputs["state"],
    )
    for value, name in zip(results, ("y", "last"), strict=True):
        value.name = name
        value.type = floats
    model = ir.to_proto(b.model(list(inputs.values()), list(results), "scan"))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    seq=st.integers(1, 4 * LENGTH), batch=st.integers(1, 3), rate=st.floats(1e-4, 40.0), seed=st.integers(0, 2**32 - 1)
)
def test_the_scan_is_the_recurrence(
    seq: int, batch: int, rate: float, seed: int, scan_model: ort.InferenceSession
) -> None:
    """In float64, one token at a time; from decays that forget nothing to those that forget all at once."""
    rng = np.random.default_rng(seed)
    shapes = {
        "drive": (batch, seq, 12),
        "decay": (batch, seq, 4),
        "B": (batch, seq, 10),
        "C": (batch, seq, 10),
        "state": (batch, 4, 5, 3),
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["decay"] = -np.abs(feeds["decay"]) * np.float32(rate)
    u, log, B, C, S = (value.astype(np.float64) for value in feeds.values())
    B, C = (np.repeat(x.reshape(batch, seq, 2, 5), 2, axis=2) for x in (B, C))
    u = u.reshape(batch, seq, 4, 3)
    outputs = []
    size = np.abs(S)
    sizes = []
    for t in range(seq):
        S = S * np.exp(log[:, t])[..., None, None] + B[:, t, :, :, None] * u[:, t, :, None]
        size = size * np.exp(log[:, t])[..., None, None] + np.abs(B[:, t, :, :, None] * u[:, t, :, None])
        outputs.append((C[:, t, :, :, None] * S).sum(2))
        sizes.append((np.abs(C[:, t, :, :, None]) * size).sum(2))
    y, last = scan_model.run(None, feeds)
    assert (
        np.abs(y - np.stack(outputs, 1)).max() <= 4e-6 * np.stack(sizes, 1).max()
    )  # as if no term cancelled; some dozens of 6e-8
    assert np.abs(last - S).max() <= 4e-6 * size.max()


@settings(deadline=None, max_examples=50, derandomize=True)
@given(pairs=st.integers(1, 99), seed=st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse(pairs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, 2 * pairs).astype(np.int8)
    assert np.array_equal(column_major.unpack(column_major.pack(codes)), codes)


@pytest.mark.parametrize(("quant", "name"), [("int4", "plain"), ("int4", "tied"), ("int8", "plain")])
def test_the_artifact_holds_the_rules_integers_bit_for_bit(
    quant: str,
    name: str,
    make_checkpoint: Callable[..., Path],
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row blocks make no difference: the vocabulary and in_proj have odd numbers of rows, blocks a few rows."""
    checkpoint = make_checkpoint(name, mamba_n_heads=3, mamba_d_ssm=96)
    artifact = build(checkpoint, quant, graph="portable")
    for module in (column_major_writer, dequantize_linear):
        monkeypatch.setattr(module, "BLOCK_BYTES", 3000)
    options = OrtOptions(accuracy_level=0, graph="portable", kv="fp32")
    again = build_artifact(checkpoint, "ort", tmp_path / "again", scheme=QuantScheme(quant), options=options)  # type: ignore[arg-type]
    assert again.manifest.files == artifact.manifest.files
    stored: Any = load_runner(artifact).stored_weights()
    store = WeightStore.open(checkpoint, artifact.config)
    assert len(stored) == 9 * artifact.config.num_hidden_layers + (1 if name == "tied" else 2)
    for weight in artifact.manifest.weights:
        (part,) = weight.parts
        rows = store.shape(part.tensor)[0]
        truth = quantize_rows(
            store.rows(part.tensor, 0, rows), Precision(weight.bits, weight.group_size), part.multiplier.rows(rows)
        )
        found = stored.quantized(part.tensor)
        assert np.array_equal(found.codes, truth.codes), part.tensor
        assert np.array_equal(found.scales, truth.scales), part.tensor


def test_genai_runs_it_at_the_level_it_was_built_for(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", graph="portable")
    runner: Any = load_runner(artifact)
    model = og.Model(str(artifact.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=40)
    generator = og.Generator(model, parameters)
    ids = np.arange(2, 12, dtype=np.int64)[None]
    generator.append_tokens(ids[:, :4].astype(np.int32))
    generator.append_tokens(ids[:, 4:].astype(np.int32))
    ours = runner.step(ids, np.ones_like(ids), runner.initial(1))[0][0, -1]
    theirs = np.asarray(generator.get_logits()).reshape(-1)
    assert np.abs(theirs - ours).max() <= EXACT * np.ptp(ours)  # level 4 would be 1e-2 off
