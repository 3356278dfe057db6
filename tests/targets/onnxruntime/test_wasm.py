"""--graph wasm: its weights are unpacked once, exactly, and a model that does not fit into a page is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from gptq_files import Written

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.targets import get_target
from h1export.targets.onnxruntime.emit import wasm
from h1export.targets.onnxruntime.options import OrtOptions

Build = Callable[..., Artifact]
EXACT = 1e-6  # of the range
IDS = np.array([[72, 105, 33, 50, 60, 7, 11, 200]])


def folded(artifact: Artifact, place: Path) -> set[str]:
    """Return the types of the nodes that are left when ONNX Runtime has folded constants, by its default options."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(place)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(artifact.folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(place, load_external_data=False).graph.node}


def same_logits(artifact: Artifact, other: Artifact) -> None:
    """Check that two graphs over the same integers give the same logits, in one call and in several."""
    found = []
    for one in (artifact, other):
        runner = load_runner(one, kernels="stock")
        states, parts = runner.initial(1), []
        for start, end in ((0, 5), (5, 6), (6, 8)):
            logits, states = runner.step(IDS[:, start:end], np.ones((1, end), np.int64), states)
            parts.append(logits[0])
        found.append(np.concatenate(parts))
    assert np.abs(found[0] - found[1]).max() <= EXACT * np.ptp(found[1])


@pytest.mark.parametrize(
    ("name", "quant"), [("everything", "int4"), ("everything", "int8"), ("odd_sizes", "int8"), ("expand", "int4")]
)
def test_weights_are_the_bytes_and_products_the_numbers_of_the_default_graph(
    name: str, quant: str, make_checkpoint: Callable[..., Path], build: Build, tmp_path: Path
) -> None:
    """Of "odd_sizes", the blocks of int8 rows are padded; "everything" has a tied head."""
    changes = {"mamba_d_ssm": 168, "mamba_d_head": 28} if (name, quant) == ("odd_sizes", "int8") else {}
    checkpoint = make_checkpoint(name, **changes)
    artifact, default = build(checkpoint, quant, graph="wasm"), build(checkpoint, quant)
    data = [(one.folder / one.manifest.weights_file).read_bytes() for one in (artifact, default)]
    assert data[0] == data[1]
    same_logits(artifact, default)
    left = folded(artifact, tmp_path / "folded.onnx")
    assert "MatMulNBits" not in left
    packed = {"GatherBlockQuantized"} if quant == "int4" else set()
    assert left & {"GatherBlockQuantized", "DequantizeLinear"} <= packed  # the embedding alone


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_zero_points_and_sorted_columns_of_prequantized_checkpoints(
    bits: int, sym: bool, make_gptq: Callable[..., Written], build: Build, tmp_path: Path
) -> None:
    written = make_gptq(tmp_path / "gptq", bits=bits, sym=sym, act_order=True)
    same_logits(*(build(written.folder, graph=graph) for graph in ("wasm", "cpu")))


def test_a_model_that_does_not_fit_is_refused(
    config_of: Callable[..., FalconH1Config], make_checkpoint: Callable[..., Path]
) -> None:
    target = get_target("ort")
    large, small = config_of(), FalconH1Config.load(make_checkpoint())
    with pytest.raises(H1ExportError, match=r"--graph wasm: unpacks \d+ weights, .* use --graph cpu") as refused:
        target.check(large, OrtOptions(graph="wasm"))  # type: ignore[attr-defined]
    assert str(wasm.MEMORY) in str(refused.value)
    for config, graph in ((large, "cpu"), (small, "wasm")):
        target.check(config, OrtOptions(graph=graph))  # type: ignore[attr-defined]
