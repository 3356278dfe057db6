"""AWQ and compressed-tensors checkpoints keep their own integers, and an adapter is merged, in a built artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import Written
from lora_files import write_adapter
from packed_by_gptqmodel import KINDS, Truth, truth_of

from h1export.checkpoint.store import WeightStore
from h1export.cli import run
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.scheme import QuantScheme
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.validate.accuracy.logits import relative_error

EXACT = 1e-5  # of the range
IDS = np.random.default_rng(0).integers(0, 264, 24, dtype=np.int64)


@pytest.mark.parametrize(
    "how",
    [
        {"layout": "awq", "sym": False},
        {"layout": "awq", "group": 64},
        {"layout": "compressed", "act_order": True, "sym": False},
        {"layout": "compressed", "bits": 8, "group": -1},
    ],
    ids=str,
)
def test_integers_and_logits_are_the_writers(
    how: dict[str, Any], make_gptq: Callable[..., Written], gptq_logits: Callable[..., Any], tmp_path: Path
) -> None:
    written = make_gptq(tmp_path / "in", **how)
    artifact = build_artifact(
        written.folder, "ort", tmp_path / "out", scheme=QuantScheme("none"), options=OrtOptions(accuracy_level=0)
    )
    runner = load_runner(artifact, float32=True)
    logits, _ = runner.step(IDS[None], np.ones((1, len(IDS)), np.int64), runner.initial(1))
    assert relative_error(logits[0], gptq_logits(written, IDS)) <= EXACT
    stored: Any = runner.stored_weights()
    for name in written.codes:
        np.testing.assert_array_equal(stored[name], written.weight(name))
    assert artifact.manifest.scheme["prequantized"]["bits"] == how.get("bits", 4)


@pytest.mark.parametrize("graph", ["cpu", "portable"])
@pytest.mark.parametrize("folder", KINDS, ids=lambda folder: folder.name)
def test_an_artifact_holds_gptqmodels_integers(folder: Path, graph: Any, tmp_path: Path) -> None:
    """The file is GPTQModel's; the truth is what its own kernel made of it."""
    artifact = build_artifact(
        folder, "ort", tmp_path / "out", scheme=QuantScheme("none"), options=OrtOptions(graph=graph)
    )
    stored: Any = load_runner(artifact, float32=True).stored_weights()
    packed = WeightStore.open(folder, FalconH1Config.load(folder)).packed
    truth = truth_of(folder)
    assert set(truth) == set(packed)
    for name, expected in truth.items():
        found = stored.quantized(name)
        matrix = packed[name]
        middle = matrix.packed_format.middle
        codes = np.empty_like(found.codes)
        codes[:, matrix.order] = found.codes
        blocks = found.scales.shape[1]
        groups = matrix.group_of[matrix.order][:: len(matrix.order) // blocks]  # the group of each block
        zeros = np.zeros((len(codes), blocks), np.int8)
        zeros[:, groups] = 0 if found.zeros is None else found.zeros
        zeros = zeros[:, : matrix.packed_format.groups(len(matrix.order))]
        assert expected == Truth.of(
            dense=stored[name], codes=codes.astype(int) + middle, zeros=zeros.astype(int) + middle
        )


@pytest.fixture(scope="module")
def adapter(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(make_checkpoint(), tmp_path_factory.mktemp("adapter"))


def test_an_adapter_on_the_command_line(
    adapter: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(make_checkpoint())
    out = str(tmp_path / "out")
    given = ["--target", "ort", "--quant", "none", "--adapter", str(adapter)]
    checks = ["--latency-pairs", "0"]
    assert run(["build", checkpoint, *given, "--out", out, "--validate", *checks, "--quiet"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (merged,) = manifest["scheme"]["adapters"]
    assert len(merged["sha256"]) == 64
    assert str(adapter.name) not in json.dumps(manifest)
    assert run(["validate", out, checkpoint, *checks, "--quiet"]) == 2
    assert "--adapter" in capfd.readouterr().err
    assert run(["validate", out, checkpoint, "--adapter", str(adapter), *checks, "--quiet"]) == 0
    assert run(["plan", checkpoint, *given, "--quiet"]) == 0
    plain = str(tmp_path / "plain")
    assert run(["build", checkpoint, "--target", "ort", "--quant", "none", "--out", plain, "--quiet"]) == 0
    assert "adapters" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["scheme"]
    assert run(["build", str(adapter), "--target", "ort", "--out", str(tmp_path / "no")]) == 2
    assert "is an adapter" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_every_method_rounds_the_merged_weights(
    method: Any, adapter: Path, spoken_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = [] if method == "rtn" else ["--calibration-samples", "2", "--calibration-length", "32"]
    given = ["--target", "ort", "--quant", "int8", "--method", method, *short, "--adapter", str(adapter)]
    out = str(tmp_path / "out")
    checks = ["--latency-pairs", "0", "--prompts", "0", "--text-bytes", "512"]
    code = run(["build", str(spoken_checkpoint), *given, "--out", out, "--validate", *checks, "--json"])
    (built,) = json.loads(capfd.readouterr().out)
    failed = [check for row in built["report"]["rows"] for check in row.get("checks", []) if not check["passed"]]
    assert code == 0, failed
