"""The network, executed on a CPU from the file that a builder reads, against transformers with the stored weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import StateSpec
from h1export.progress import SILENT
from h1export.report.checks import CheckKind, Comparison, Phase
from h1export.runtime.runner import Runner
from h1export.validate.accuracy.bisect import bisect
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validate
from h1export.validate.accuracy.states import row_of_batch, state_errors

# of the range; bf16 has three bits fewer than fp16
EXACT = 1e-5
HALF = 5e-3
BRAIN = 4e-2
FP16_STEP = 2.0**-10  # from a number to the next
CALLS = (20, 1, 1, 17, 1)
PADS = (0, 7)

Build = Callable[..., Artifact]
Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def network(build: Build, without_plugin: None) -> Callable[..., Artifact]:
    """network(checkpoint, "int4", compute="bf16") builds an artifact for two sequences of 96 tokens."""
    common = {"target": "trt", "max_context": 96, "max_batch": 2, "runtime": "tensorrt"}
    return lambda checkpoint, quant="int4", **chosen: build(checkpoint, quant, **common | chosen)


def worst(artifact: Artifact, checkpoint: Path, float32: bool) -> float:
    """Return the largest error of logits and states, relative to their range, over CALLS of two rows, one padded."""
    runner = load_runner(artifact, float32=float32)
    reference = Reference(checkpoint)
    reference.hold(runner.stored_weights())
    length = sum(CALLS)
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (2, length), dtype=np.int64)
    mask = np.array([[column >= pad for column in range(length)] for pad in PADS], np.int64)
    states = runner.initial(2)
    logits = []
    end = 0
    for tokens in CALLS:
        end += tokens
        answer, states = runner.step(ids[:, end - tokens : end], mask[:, :end], states)
        logits.append(answer)
    joined = np.concatenate(logits, axis=1)
    snapshot = runner.snapshot(states)
    errors = []
    for row, pad in enumerate(PADS):
        truth, true_states = reference.full(ids[row, pad:])
        found = row_of_batch(snapshot, StateSpec.of(runner.config), row, pad=pad)
        errors += [
            relative_error(joined[row, pad:], truth),
            *state_errors([(found, true_states)], StateSpec.of(runner.config)).values(),
        ]
    return max(errors)


def test_every_switch(checkpoint: Path, network: Build) -> None:
    artifact = network(checkpoint)
    assert worst(artifact, checkpoint, float32=True) <= EXACT
    assert EXACT < worst(artifact, checkpoint, float32=False) <= HALF


@pytest.mark.parametrize(
    ("quant", "compute", "limit"), [("none", "fp16", HALF), ("int4", "bf16", BRAIN), ("none", "bf16", BRAIN)]
)
def test_other_dtypes(
    quant: str, compute: str, limit: float, make_checkpoint: Callable[..., Path], network: Build
) -> None:
    assert EXACT < worst(network(make_checkpoint(), quant, compute=compute), make_checkpoint(), float32=False) <= limit


def test_validate_passes_as_for_every_target(make_checkpoint: Callable[..., Path], network: Build) -> None:
    checkpoint = make_checkpoint()
    artifact = network(checkpoint, max_context=192, max_batch=3)
    runner = load_runner(artifact)
    exact = load_runner(artifact, float32=True)
    report = validate(
        artifact, runner, exact, checkpoint=checkpoint, options=ValidateOptions(pairs=1, bisect=True), progress=SILENT
    )
    assert report.passed, report.to_json()
    cases = {row.case: row for row in report.rows if row.comparison is Comparison.STORED}
    assert cases["padded batch of 3"].figures["states"] <= EXACT
    assert "room for 192 tokens" in cases["512 decode steps"].note
    rows = {(row.kind, row.phase): row for row in report.rows}
    assert "not TensorRT" in rows[CheckKind.LATENCY, None].note
    fp16 = rows[CheckKind.FP16_RANGE, None]
    assert 0 < fp16.figures["share"] < 0.1
    assert {"SSMScan", "MatMul", "Attention"} <= fp16.details.keys()
    assert "right in 2 layers" in rows[CheckKind.BISECT, Phase.DECODE].note


def test_a_prompt_longer_than_the_profile_and_the_last_row(
    make_checkpoint: Callable[..., Path], network: Build, monkeypatch: Any
) -> None:
    monkeypatch.setattr("h1export.targets.tensorrt.network.limits.PREFILL_TOKENS", 32)
    checkpoint = make_checkpoint()
    runner = load_runner(network(checkpoint), float32=True)
    reference = Reference(checkpoint)
    reference.hold(runner.stored_weights())
    ids = np.random.default_rng(1).integers(0, runner.config.vocab_size, (1, 96), dtype=np.int64)
    logits, states = runner.step(ids, np.ones((1, 96), np.int64), runner.initial(1))
    assert relative_error(logits[0], reference.full(ids[0])[0]) <= EXACT
    with pytest.raises(H1ExportError, match=r"97 tokens, and the network has room for 96; .*--max-context 97"):
        runner.step(ids[:, :1], np.ones((1, 97), np.int64), states)
    with pytest.raises(H1ExportError, match="--max-batch 3"):
        runner.initial(3)


def test_only_the_last_logits(make_checkpoint: Callable[..., Path], network: Build) -> None:
    every, last = (load_runner(network(make_checkpoint(), logits=logits)) for logits in ("all", "last"))
    ids = np.arange(9)[None]
    ones = np.ones((1, 9), np.int64)
    expected, answer = (runner.step(ids, ones, runner.initial(1))[0] for runner in (every, last))
    np.testing.assert_allclose(
        answer, expected[:, -1:], rtol=FP16_STEP
    )  # one row's product may be summed in another order


def of(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def declare(model: onnx.ModelProto, name: str, kind: int) -> str:
    model.graph.value_info.append(helper.make_tensor_value_info(name, kind, None))
    return name


def drop_a_multiplier(model: onnx.ModelProto) -> None:
    """Replace the last µP product of layer 1 by its operand."""
    products = {name for node in of(model, "MatMul") for name in node.output}
    node = [node for node in of(model, "Mul") if node.input[0] in products][-1]
    (read,) = [reader for reader in model.graph.node if node.output[0] in reader.input]
    read.input[list(read.input).index(node.output[0])] = node.input[0]


def swap_b_and_c(model: onnx.ModelProto) -> None:
    node = of(model, "SSMScan")[1]
    node.input[3], node.input[4] = node.input[4], node.input[3]


def stale_state(model: onnx.ModelProto) -> None:
    """Let layer 1 return the state that it was given."""
    node = of(model, "SSMScan")[1]
    state = node.input[7]
    node.output[1] = declare(model, "unused", onnx.TensorProto.FLOAT)
    model.graph.node.append(helper.make_node("Identity", [state], ["present.1.recurrent_state"]))


def one_column_on(model: onnx.ModelProto) -> None:
    """Write the values of layer 0 one column too far to the right."""
    node = of(model, "TensorScatter")[1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one too many"))
    model.graph.node.insert(0, helper.make_node("Add", [node.input[2], "one too many"], ["too far"]))
    node.input[2] = declare(model, "too far", onnx.TensorProto.INT64)


def damaged(artifact: Artifact, folder: Path, edit: Edit) -> Artifact:
    """Return a copy of the artifact whose model ``edit`` has changed."""
    copy = Path(shutil.copytree(artifact.folder, folder / "changed"))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, copy / "model.onnx")
    return Artifact(copy, artifact.manifest)


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (drop_a_multiplier, "layer 1"),
        (swap_b_and_c, "layer 1, scan"),
        (stale_state, "1.recurrent_state"),
        (one_column_on, "layer 0"),
    ],
)
def test_a_planted_fault_is_found_and_named(
    edit: Edit, place: str, make_checkpoint: Callable[..., Path], network: Build, tmp_path: Path
) -> None:
    artifact = network(make_checkpoint())
    found = {}
    for name, one in (("good", artifact), ("bad", damaged(artifact, tmp_path, edit))):
        runner: Runner[Any] = load_runner(one, float32=True)
        reference = Reference(make_checkpoint())
        reference.hold(runner.stored_weights())
        rows = bisect(runner, reference, Comparison.STORED, tolerance=5e-5, seed=0)
        found[name] = [row for row in rows if row.verdict == "FAIL"]
    assert found["good"] == []
    assert found["bad"]
    assert place in found["bad"][0].note, found["bad"][0].note


def test_a_flipped_nibble(make_checkpoint: Callable[..., Path], network: Build, tmp_path: Path) -> None:
    artifact = network(make_checkpoint())
    copy = Path(shutil.copytree(artifact.folder, tmp_path / "changed"))
    name = "model.layers.1.feed_forward.down_proj.weight"
    tensors = {
        tensor.name: tensor for tensor in onnx.load(copy / "model.onnx", load_external_data=False).graph.initializer
    }
    offset = int(next(entry.value for entry in tensors[f"{name}.codes"].external_data if entry.key == "offset"))
    data = np.memmap(copy / "model.onnx.data", np.uint8, mode="r+")
    data[offset + 5] ^= 0x08  # the sign of one code
    data.flush()
    before, after = (load_runner(one).stored_weights()[name] for one in (artifact, Artifact(copy, artifact.manifest)))
    assert (before != after).sum() == 1
    runner = load_runner(Artifact(copy, artifact.manifest))
    report = validate(
        Artifact(copy, artifact.manifest),
        runner,
        runner,
        checkpoint=make_checkpoint(),
        options=ValidateOptions(pairs=0),
        progress=SILENT,
    )
    assert CheckKind.STORED_INTEGERS in {row.kind for row in report.rows if row.verdict == "FAIL"}


def point_outside(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value


def undeclared(model: onnx.ModelProto) -> None:
    name = of(model, "MatMul")[0].output[0]
    model.graph.value_info.remove(next(info for info in model.graph.value_info if info.name == name))


def test_a_value_without_a_dtype_is_refused(
    make_checkpoint: Callable[..., Path], network: Build, tmp_path: Path
) -> None:
    with pytest.raises(H1ExportError, match=r"model.onnx: declares no dtype of value '\w+'"):
        load_runner(damaged(network(make_checkpoint()), tmp_path, undeclared))


def test_data_outside_the_folder_is_refused(
    make_checkpoint: Callable[..., Path], network: Build, tmp_path: Path
) -> None:
    with pytest.raises(H1ExportError, match=r"points to '../secret', which is no file of the artifact"):
        load_runner(damaged(network(make_checkpoint()), tmp_path, point_outside))
