"""The harness on an export of transformers' own OnnxExporter: right as it is, wrong where a fault is planted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from h1export.errors import H1ExportError
from h1export.integrations.onnx_exporter import ExporterRunner
from h1export.report.checks import CheckKind
from h1export.report.report import Report, Verdict
from h1export.validate.accuracy.run import ValidateOptions, judge

CHUNK = 16  # of the checkpoint: the case "one chunk" is a prefill, the others are decode steps


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(num_hidden_layers=1)


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only decode has dynamic shapes, and neither is optimised: the export takes 10 s, and 30 s otherwise."""
    from transformers import FalconH1ForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    folder = tmp_path_factory.mktemp("exporter") / "export"
    model: Any = FalconH1ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(CHUNK)[None]
    configs = {"prefill": OnnxConfig(dynamic=False, optimize=False), "decode": OnnxConfig(dynamic=True, optimize=False)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export_for_generation(model, inputs, configs).save_pretrained(folder)
    return folder


def judged(folder: Path, checkpoint: Path) -> Report:
    return judge(ExporterRunner(folder), checkpoint, ValidateOptions(pairs=0, contexts=(40,)))


def failed(report: Report) -> set[str]:
    """The cases that fail, or the kinds of rows that are not about a case."""
    return {row.case or row.kind for row in report.rows if row.verdict is Verdict.FAIL}


def edited(exported: Path, folder: Path, name: str, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy with another graph ``name``."""
    copy = Path(shutil.copytree(exported, folder / "edited"))
    model = onnx.load(copy / name)
    edit(model)
    (copy / f"{name}.data").unlink()
    onnx.save(model, copy / name)
    return copy


def test_a_right_export_passes(exported: Path, checkpoint: Path) -> None:
    report = judged(exported, checkpoint)
    assert failed(report) == set(), report.to_json()
    verdicts = {row.case or row.kind: row.verdict for row in report.rows}
    assert verdicts["padded batch of 3"] is Verdict.NOT_APPLICABLE
    passed = {check for check, verdict in verdicts.items() if verdict is Verdict.PASS}
    assert {"one token", "one chunk", "512 decode steps", "ragged chunks", CheckKind.CONTEXT} < passed
    assert "prefill takes 16 tokens" in report.subject["notes"][0]


def test_a_stale_state_fails(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    """decode hands back the recurrent state that it was given: right after one prefill, wrong after a step."""

    def stale(model: onnx.ModelProto) -> None:
        name = "output.cache.layers.0.recurrent_states.0"
        for node in model.graph.node:
            node.output[:] = ["fault" if output == name else output for output in node.output]
        model.graph.node.append(onnx.helper.make_node("Identity", ["input.cache.layers.0.recurrent_states.0"], [name]))

    found = failed(judged(edited(exported, tmp_path, "decode.onnx", stale), checkpoint))
    assert {"one token", "512 decode steps", CheckKind.CONTEXT} < found
    assert "one chunk" not in found


def test_a_wrong_weight_in_one_of_the_two_graphs_fails(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    def halve(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("mamba.conv1d.bias")]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.5), tensor.name))

    assert failed(judged(edited(exported, tmp_path, "prefill.onnx", halve), checkpoint)) == {"one chunk"}


def test_what_its_graphs_cannot_take_is_refused(exported: Path, tmp_path: Path) -> None:
    runner = ExporterRunner(exported)
    for mask in (np.ones((2, 3), np.int64), np.array([[0, 1, 1]])):
        with pytest.raises(H1ExportError, match="one row without pads"):
            runner.step(np.ones_like(mask), mask, runner.initial(len(mask)))
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(H1ExportError, match="cannot load"):
        ExporterRunner(tmp_path)
