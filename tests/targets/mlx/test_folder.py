"""Folders for MLX: the integers of every other target, what is refused, and what mlx-lm's own commands make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_files import Gptq, write
from safetensors.torch import load_file, save_file

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.commands.plan import plan_build
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import SILENT
from h1export.quantize.scheme import QuantScheme
from h1export.runtime.generation import Sampling, generate
from h1export.targets import get_target
from h1export.targets.mlx import sdk
from h1export.targets.mlx.options import MlxOptions

Build = Callable[..., Artifact]
STATES = {"mamba_d_state": 32}
PACKABLE = STATES | {"vocab_size": 264, "num_hidden_layers": 1, "mamba_d_ssm": 256, "mamba_n_heads": 8}


@pytest.mark.parametrize("method", ["rtn", "search", "awq", "gptq"])
@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_the_integers_are_those_of_onnx_runtime(method: str, compute: str, spoken: Path, build: Build) -> None:
    mine = load_runner(build(spoken, "int4", method=method, target="mlx", compute=compute)).stored_weights()
    theirs = load_runner(build(spoken, "int4", method=method), kernels="stock").stored_weights()
    assert set(theirs) == set(mine)
    for name in theirs:
        one, other = mine.quantized(name), theirs.quantized(name)  # type: ignore[attr-defined]
        assert np.array_equal(one.codes, other.codes), name
        if compute == "fp32":
            assert np.array_equal(one.scales, other.scales), name


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_mlx_dequantises_what_the_integers_say(quant: str, spoken: Path, build: Build) -> None:
    """By MLX's own function, with none of our reader's code: codes x scale x µP."""
    mx = sdk.core()
    artifact = build(spoken, quant, target="mlx", compute="fp32")
    (shard,) = artifact.folder.glob("model-*.safetensors")
    tensors = mx.load(str(shard))
    settings = json.loads((artifact.folder / "config.json").read_text())["quantization"]
    stored = load_runner(artifact).stored_weights()
    assert len(stored) == len(artifact.manifest.weights) == 20
    for weight in artifact.manifest.weights:
        (part,) = weight.parts
        module = part.tensor.removesuffix(".weight")
        how = settings.get(module, settings)
        words, scales, biases = (tensors[f"{module}.{name}"] for name in ("weight", "scales", "biases"))
        dense = np.array(mx.dequantize(words, scales, biases, group_size=how["group_size"], bits=how["bits"]))
        expected = stored[part.tensor] * part.multiplier.rows(len(dense))[:, None]
        np.testing.assert_allclose(dense, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "grouped norm": ({"mamba_rms_norm": True, "mamba_n_groups": 2}, "mlx-lm's norm takes all channels as one group"),
    "dt above": ({"time_step_limit": (0.0, 0.3)}, "mlx-lm bounds no time step"),
    "dt below": ({"time_step_limit": (0.05, float("inf"))}, "mlx-lm bounds no time step"),
    "states": ({"mamba_d_state": 24}, "mlx-lm's Metal kernel drops what 32 does not divide"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_mlx_lm_computes_wrongly_is_refused_before_any_work(
    name: str, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, line = REFUSALS[name]
    monkeypatch.setattr("h1export.checkpoint.store.WeightStore.rows", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(H1ExportError) as caught:
        build_artifact(make_checkpoint(**STATES | changes), "mlx", tmp_path / "out", scheme=QuantScheme("int4"))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "compute", "line"),
    [
        ({"act_order": True}, "fp32", "has its columns in the order of act-order"),
        ({}, "fp16", "--compute: fp16 would round the scales of a prequantized checkpoint"),
    ],
    ids=["act-order", "fp16"],
)
def test_prequantized_checkpoints_that_would_change_are_refused(
    how: dict[str, Any], compute: Any, line: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed_checkpoint(make_checkpoint, tmp_path, how)
    with pytest.raises(H1ExportError, match=line):
        build_artifact(folder, "mlx", tmp_path / "out", scheme=QuantScheme("none"), options=MlxOptions(compute=compute))


@pytest.mark.parametrize("how", [{}, {"sym": False}, {"bits": 8, "group": -1}], ids=["sym", "zeros", "int8"])
def test_prequantized_checkpoints_keep_every_integer(
    how: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed_checkpoint(make_checkpoint, tmp_path, how)
    artifact = build_artifact(
        folder, "mlx", tmp_path / "out", scheme=QuantScheme("none"), options=MlxOptions(compute="fp32")
    )
    source = WeightStore.open(folder, artifact.config)
    stored = load_runner(artifact).stored_weights()
    assert stored.keys() == source.packed.keys()
    for name, matrix in source.packed.items():
        assert np.array_equal(stored[name], matrix.dense(0, matrix.shape[0])), name


def packed_checkpoint(make_checkpoint: Callable[..., Path], folder: Path, how: dict[str, Any]) -> Path:
    return write(make_checkpoint(**PACKABLE), folder / "checkpoint", Gptq(**how)).folder


def test_config_json_has_every_value_and_no_key_of_others(spoken: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(spoken, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_file": "evil.py", "quantize_activations": True, "rope_traditional": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    artifact = build_artifact(checkpoint, "mlx", tmp_path / "out", scheme=QuantScheme("none"))
    found = json.loads((artifact.folder / "config.json").read_text())
    assert not {"model_file", "quantize_activations", "rope_traditional", "quantization"} & found.keys()
    assert artifact.config == FalconH1Config.load(checkpoint)
    assert found["rope_theta"] == artifact.config.rope_theta


def test_a_plan_has_the_sizes_and_two_builds_the_bytes(spoken: Path, build: Build, tmp_path: Path) -> None:
    artifact = build(spoken, "int4", target="mlx")
    scheme = QuantScheme("int4")
    plan = plan_build(spoken, "mlx", tmp_path / "out", scheme=scheme)
    sizes = {name: size for name, (_, size) in artifact.manifest.files.items()}
    assert {name: size for name, size in plan.files.items() if name != "manifest.json"} == sizes
    again = build_artifact(spoken, "mlx", tmp_path / "out", scheme=scheme, jobs=2)
    assert again.manifest.files == artifact.manifest.files


def test_mlx_lm_generates_the_text_of_our_generate(spoken: Path, build: Build) -> None:
    from mlx_lm.generate import generate_step

    artifact = build(spoken, "int4", target="mlx")
    prompt = np.arange(40, 60)
    mine = list(generate(load_runner(artifact), prompt, 12, sampling=Sampling(), eos=frozenset()))
    mx = sdk.core()
    model, _ = sdk.utils().load_model(artifact.folder)
    theirs = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
    assert mine == theirs


def test_doctor_finds_mlx_lm(spoken: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = build(spoken, "int4", target="mlx")

    def findings() -> dict[str, Any]:
        found = get_target("mlx").examine(artifact, build=False, progress=SILENT)
        return {finding.name: finding for finding in found}

    assert all(findings()[name].passed for name in ("mlx-lm", "loading"))
    monkeypatch.setattr("h1export.targets.mlx.sdk.FOLDED_FOR", "0.1")
    assert "0.32.2; folders were checked with 0.1" in findings()["mlx-lm"].detail


def test_a_missing_package_is_named(spoken: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    artifact = build(spoken, "int4", target="mlx")
    monkeypatch.setattr(sdk, "import_module", missing)
    with pytest.raises(H1ExportError, match=r"mlx: is not installed; pip install 'h1export\[mlx\]'"):
        load_runner(artifact)


def test_a_damaged_folder_is_an_error(spoken: Path, build: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(build(spoken, "int4", target="mlx").folder, tmp_path / "out"))
    (shard,) = folder.glob("model-*.safetensors")
    tensors = load_file(shard)
    del tensors["model.layers.1.mamba.D"]
    save_file(tensors, shard, metadata={"format": "mlx"})
    with pytest.raises(H1ExportError, match="mlx-lm cannot load it"):
        load_runner(Artifact(folder, build(spoken, "int4", target="mlx").manifest))
