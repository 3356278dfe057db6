"""Planted faults: an artifact that is wrong in one thing must fail the harness's default gates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from h1export import pipeline
from h1export.core.artifact import Artifact
from h1export.core.progress import SILENT
from h1export.core.report import Report, Row, Verdict
from h1export.targets import Kernels
from h1export.validate import ValidateOptions, validate

pytestmark = pytest.mark.ort
Build = Callable[..., Artifact]
MakeCheckpoint = Callable[..., Path]

MULTIPLIERS = [
    "embedding_multiplier",
    "lm_head_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
    *(("ssm_multipliers", i) for i in range(5)),
    *(("mlp_multipliers", i) for i in range(2)),
]


def judge(artifact: Artifact, checkpoint: Path, runner: Any = None, kernels: Kernels = "auto") -> Report:
    exact = runner or pipeline.load(artifact, float32=True, kernels=kernels)
    shipped = runner or pipeline.load(artifact, kernels=kernels)
    return validate(artifact, shipped, exact, checkpoint, ValidateOptions(pairs=0), SILENT)


def failed(report: Report) -> list[Row]:
    assert not report.passed
    return [row for row in report.rows if row.verdict is Verdict.FAIL]


def edited_config(checkpoint: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of ``checkpoint`` whose config.json says something else."""
    wrong = Path(shutil.copytree(checkpoint, folder / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    edit(config)
    (wrong / "config.json").write_text(json.dumps(config))
    return wrong


def edited_graph(artifact: Artifact, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Artifact:
    """A copy of ``artifact`` with another graph; the manifest keeps up with the size."""
    copy = Path(shutil.copytree(artifact.folder, folder / "edited"))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, copy / "model.onnx")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["model.onnx"][1] = (copy / "model.onnx").stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.open(copy)


@pytest.mark.parametrize(("quant", "level"), [("none", 0), ("int4", 4)])
@pytest.mark.parametrize("key", MULTIPLIERS, ids=str)
def test_a_dropped_multiplier_fails(
    key: Any, quant: str, level: int, make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path
) -> None:
    def drop(config: dict[str, Any]) -> None:
        if isinstance(key, str):
            config[key] = 1.0
        else:
            config[key[0]][key[1]] = 1.0

    truth = make_checkpoint()
    artifact = build(edited_config(truth, tmp_path, drop), quant, accuracy_level=level)
    against = "source" if quant == "none" else "stored"
    assert any(row.against == against for row in failed(judge(artifact, truth)))


def test_a_wrong_rope_base_fails(make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path) -> None:
    truth = make_checkpoint()
    artifact = build(edited_config(truth, tmp_path, lambda config: config["rope_parameters"].update(rope_theta=1e10)))
    rows = failed(judge(artifact, truth))
    assert "one token" not in {row.check for row in rows}  # position 0 does not turn
    assert "512 decode steps" in {row.check for row in rows}


def test_swapped_b_and_c_fail(make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "LinearAttention":
                node.input[0], node.input[1] = node.input[1], node.input[0]

    truth = make_checkpoint()
    assert failed(judge(edited_graph(build(truth), tmp_path, swap), truth, kernels="stock"))


def test_a_convolution_off_by_one_fails(make_checkpoint: MakeCheckpoint, build: Build, tmp_path: Path) -> None:
    def rotate(model: onnx.ModelProto) -> None:
        names = {
            f"model.layers.1.mamba.conv1d.weight.taps.{tap}": f"model.layers.1.mamba.conv1d.weight.taps.{(tap + 1) % 4}" for tap in range(4)
        }
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    truth = make_checkpoint()
    assert failed(judge(edited_graph(build(truth), tmp_path, rotate), truth, kernels="stock"))


@pytest.mark.parametrize("kind", ["recurrent_state", "conv_state", "key", "value"])
def test_a_stale_state_fails(kind: str, make_checkpoint: MakeCheckpoint, build: Build) -> None:
    """One layer hands back the state it was given; the first call cannot show it, later ones must."""
    truth, name = make_checkpoint(), f"past_key_values.1.{kind}"
    artifact = build(truth)
    runner: Any = pipeline.load(artifact)
    step = runner.step

    def stale(ids: Any, mask: Any, states: Any) -> Any:
        logits, new = step(ids, mask, states)
        old = states[name]
        if old.shape != new[name].shape:  # a cache must grow all the same
            old = np.concatenate([old, np.zeros_like(new[name][:, :, old.shape[2] :])], axis=2)
        return logits, {**new, name: old}

    runner.step = stale
    rows = failed(judge(artifact, truth, runner))
    assert "512 decode steps" in {row.check for row in rows}
    assert all(f"worst state 1.{kind}" in row.note for row in rows if row.check == "one token")


@pytest.mark.parametrize(("quant", "bits", "method"), [("int4", 4, "rtn"), ("int8", 8, "rtn"), ("int4", 4, "search"), ("int4", 4, "gptq")])
def test_one_wrong_block_fails(quant: str, bits: int, method: str, spoken_checkpoint: Path, build: Build, tmp_path: Path) -> None:
    """32 codes of one row of one layer: invisible to a comparison with the stored weights, so the integers are checked too."""
    truth = spoken_checkpoint
    artifact = build(truth, quant, method=method)
    assert judge(artifact, truth).passed
    copy = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    name = "model.layers.1.mamba.out_proj.weight|model.layers.1.self_attn.o_proj.weight.codes"
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    offset += artifact.spec.mamba_d_ssm * bits // 8  # o_proj's first column
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[offset : offset + 16] = bytes(byte ^ 0x88 for byte in data[offset : offset + 16])
    (copy / "model.onnx.data").write_bytes(bytes(data))
    rows = failed(judge(Artifact.open(copy), truth))
    assert [row.check for row in rows if "block" in row.figures] == ["stored integers"]
    assert rows[0].note.endswith("model.layers.1.self_attn.o_proj.weight")


def test_answers_that_are_not_numbers_fail(make_checkpoint: MakeCheckpoint, build: Build) -> None:
    truth = make_checkpoint()
    artifact = build(truth)
    runner: Any = pipeline.load(artifact)
    step = runner.step

    def broken(ids: Any, mask: Any, states: Any) -> Any:
        logits, new = step(ids, mask, states)
        logits[..., -1, 3] = np.nan
        return logits, new

    runner.step = broken
    assert len(failed(judge(artifact, truth, runner))) == 8
