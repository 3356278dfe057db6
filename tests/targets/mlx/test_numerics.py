"""Folders for MLX, computed by mlx-lm itself, against transformers with the weights that they store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runner_errors import worst
from safetensors.torch import load_file, save_file

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.progress import SILENT
from h1export.targets.mlx import sdk
from h1export.validate.accuracy.logits import relative_error
from h1export.validate.accuracy.reference import Reference
from h1export.validate.accuracy.run import ValidateOptions, validate

Build = Callable[..., Artifact]
# switches of conftest.py, but for those that test_folder.py finds refused
COMPUTED = ("plain", "all_biases", "tied", "odd_sizes", "expand", "no_mup")
STATES = {"mamba_d_state": 32}
EXACT = 1e-5
CALLS = (40, 1, 1, 17, 300, 1)  # prefills, one of them longer than a step of mlx-lm's scan, and decodes between them


def errors_of(artifact: Artifact, checkpoint: Path) -> tuple[float, float]:
    runner = load_runner(artifact)
    reference = Reference(checkpoint)
    reference.hold(runner.stored_weights())
    return worst(runner, reference, CALLS)


@pytest.mark.parametrize("name", COMPUTED)
def test_every_switch_is_exact_in_fp32(name: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    """Biases of attention too, which the folding before a published checkpoint is loaded would miss."""
    checkpoint = make_checkpoint(name, **STATES)
    assert max(errors_of(build(checkpoint, "int4", target="mlx", compute="fp32"), checkpoint)) <= EXACT


@pytest.mark.parametrize("before", [False, True])
def test_a_gated_norm_of_one_group_is_exact(before: bool, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(**STATES, mamba_rms_norm=True, mamba_norm_before_gate=before)
    assert max(errors_of(build(checkpoint, "int4", target="mlx", compute="fp32"), checkpoint)) <= EXACT


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_every_precision_is_exact_in_fp32(quant: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(**STATES)
    assert max(errors_of(build(checkpoint, quant, target="mlx", compute="fp32"), checkpoint)) <= EXACT


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
@pytest.mark.parametrize(("compute", "bound"), [("fp16", 8e-3), ("bf16", 6e-2)])
def test_half_precision(
    quant: str, compute: str, bound: float, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    """Only in arithmetic: the same folder computed in float32 is what its stored weights say."""
    checkpoint = make_checkpoint(**STATES)
    artifact = build(checkpoint, quant, target="mlx", compute=compute)
    runner, exact = load_runner(artifact), load_runner(artifact, float32=True)
    assert (runner.provenance.float32, exact.provenance.float32) == (False, True)
    reference = Reference(checkpoint)
    reference.hold({**runner.stored_weights(), **runner.stored_floats()})  # type: ignore[attr-defined]
    assert EXACT < max(worst(runner, reference, CALLS)) <= bound
    assert max(worst(exact, reference, CALLS)) <= EXACT


@pytest.mark.parametrize(("quant", "compute"), [("int8", "fp16"), ("int4", "bf16"), ("none", "fp16")])
def test_validate_passes(quant: str, compute: str, spoken: Path, build: Build) -> None:
    artifact = build(spoken, quant, target="mlx", compute=compute)
    options = ValidateOptions(pairs=0, quick=True)
    runner, exact = load_runner(artifact), load_runner(artifact, float32=quant != "none")
    report = validate(artifact, runner, exact, checkpoint=spoken, options=options, progress=SILENT)
    assert report.passed, report.to_json()


def test_validate_fails_on_a_wrong_scale(spoken: Path, build: Build, tmp_path: Path) -> None:
    """The room for rounded scales is narrow: 2 % more of one row's scales is too much."""
    folder = Path(shutil.copytree(build(spoken, "int8", target="mlx").folder, tmp_path / "out"))
    (shard,) = folder.glob("model-*.safetensors")
    tensors = load_file(shard)
    name = "model.layers.0.mamba.out_proj."
    for part in ("scales", "biases"):
        tensors[name + part][3] *= 1.02
    save_file(tensors, shard, metadata={"format": "mlx"})
    artifact = Artifact(folder, build(spoken, "int8", target="mlx").manifest)
    runner = load_runner(artifact)
    options = ValidateOptions(pairs=0, quick=True)
    report = validate(artifact, runner, runner, checkpoint=spoken, options=options, progress=SILENT)
    assert not report.passed


def test_what_mlx_lm_makes_of_the_published_layout(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """mlx-lm 0.32.2 forgets two multipliers while it folds: of keys (key_multiplier), of values (attention_in).

    Without those two the same loader is exact, and with them it is far off, which is why a folder arrives folded.
    """
    found = {}
    for name, changes in {
        "published": {},
        "without": {"key_multiplier": 1.0, "attention_in_multiplier": 1.0},
    }.items():
        checkpoint = Path(shutil.copytree(make_checkpoint(**STATES, **changes), tmp_path / name))
        tensors = {key: tensor.float() for key, tensor in load_file(checkpoint / "model.safetensors").items()}
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 1e11}))
        model, _ = sdk.utils().load_model(checkpoint)
        ids = np.random.default_rng(0).integers(0, 259, (1, 32))
        logits = np.array(model(sdk.core().array(ids)))[0]
        found[name] = relative_error(logits, Reference(checkpoint).full(ids[0])[0])
    assert found["published"] > 0.05
    assert found["without"] <= EXACT


def test_last_logits(spoken: Path, build: Build) -> None:
    runner = load_runner(build(spoken, "int4", target="mlx", logits="last"))
    ids = np.arange(1, 8)[None]
    logits, _ = runner.step(ids, np.ones_like(ids), runner.initial(1))
    every = load_runner(build(spoken, "int4", target="mlx"))
    assert np.array_equal(logits, every.step(ids, np.ones_like(ids), every.initial(1))[0][:, -1:])
