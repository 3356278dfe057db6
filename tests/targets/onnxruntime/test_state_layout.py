"""States as graphs store them, and the manifests and builds in which they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind, StateSpec
from h1export.targets.onnxruntime.state_layout import CUDA_PERMUTATION, PERMUTATION, StateLayout

Build = Callable[..., Artifact]


@pytest.mark.parametrize("permutation", [PERMUTATION, CUDA_PERMUTATION])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_what_is_stored_comes_back(dtype: type[Any], permutation: Any, tiny: Path) -> None:
    """Keys and values in every dtype; states that passed through it once pass again without a change."""
    kinds = (StateKind.KEY, StateKind.VALUE)
    layout = StateLayout(permutation, {} if dtype is np.float32 else dict.fromkeys(kinds, dtype))
    for tensor in StateSpec.of(FalconH1Config.load(tiny)).of_layer(0):
        state = np.random.default_rng(0).standard_normal(tensor.sized(2, 5)).astype(np.float32)
        stored = layout.stored(tensor.kind, state)
        assert stored.dtype == layout.dtype(tensor.kind)
        assert stored.shape == layout.sized(tensor, 2, 5)
        read = layout.canonical(tensor.kind, stored)
        assert read.dtype == np.float32
        assert read.shape == state.shape
        assert np.array_equal(layout.stored(tensor.kind, read), stored)
        narrow = tensor.kind in kinds and dtype is not np.float32
        assert np.array_equal(read, state) != narrow
        assert np.abs(read - state).max() <= (0.02 if narrow else 0)


def test_a_build_whose_heads_do_not_fit_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint("odd_sizes")  # heads of 16 columns
    out = tmp_path / "out"
    assert cli.run(["build", str(checkpoint), "--target", "ort", "--kv", "int8", "--out", str(out)]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line == (
        "h1export: --kv: int8 has a scale for every 32 columns, and the heads of this model have 16; "
        "use fp16 or fp32, or leave --kv out"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("past_key_values.0.key", ["INT8", ["batch", 2, "past", 32]]),
        ("past_key_values.0.key", ["INT8", []]),
        ("past_key_values.1.value", ["INT4", ["batch", 2, "past", 34]]),
        ("past_key_values.0.recurrent_state", ["INT8", ["batch", 6, 16, 34]]),
    ],
)
def test_a_manifest_with_states_that_no_graph_has_is_refused(
    name: str, port: Any, make_checkpoint: Callable[..., Path], build: Build, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(build(make_checkpoint(), kv="int8").folder, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["inputs"][name] = port
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(H1ExportError, match=f"has the state {name} in '{port[0]}'"):
        load_runner(Artifact.open(copy))


def test_the_readme_says_what_a_row_is(make_checkpoint: Callable[..., Path], build: Build) -> None:
    text = (build(make_checkpoint(), kv="int8").folder / "README.md").read_text(encoding="utf-8")
    assert "the scale of each 32 codes, 1.0625 bytes a number" in text
    assert "head_dim codes" in text
