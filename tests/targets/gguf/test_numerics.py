"""Files in llama.cpp itself, against transformers with the weights that they store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.load import load_runner
from h1export.progress import SILENT
from h1export.report.checks import CheckKind, Comparison
from h1export.validate.accuracy.run import ValidateOptions, validate

Build = Callable[..., Artifact]
Worst = Callable[..., tuple[float, float]]
EXACT = 1e-5  # of the range
ROUNDED = 8e-2  # activations in 8 bits
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "gated norm of two groups": ("norm_after_gate_two_groups", {}),
    "tied, without a bias of the convolution": ("tied", {}),
    "tied": ("plain", {"tie_word_embeddings": True}),
    "without a bias of the convolution": ("plain", {"mamba_conv_bias": False}),
    "MLP biases": ("plain", {"mlp_bias": True}),
    "norm before the gate, and no norm": ("plain", {"mamba_norm_before_gate": True}),
    "odd sizes": ("odd_sizes", {}),
    "expand": ("expand", {}),
    "no µP": ("no_mup", {}),
}


@pytest.mark.parametrize("name", list(TAKEN))
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_models_are_exact(
    name: str, quant: str, make_checkpoint: Callable[..., Path], build: Build, worst: Worst
) -> None:
    base, changes = TAKEN[name]
    checkpoint = make_checkpoint(base, **changes)
    assert max(worst(build(checkpoint, quant, target="gguf"), checkpoint)) <= EXACT


@pytest.mark.parametrize("floats", ["f32", "f16", "bf16"])
def test_the_embedded_model_in_floats(floats: str, tiny: Path, build: Build, worst: Worst) -> None:
    artifact = build(tiny, "none", target="gguf", floats=floats)
    assert max(worst(artifact, tiny)) <= EXACT  # against transformers with the rounded weights
    assert load_runner(artifact).provenance.float32 == (floats == "f32")


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"head": "q4_0", "embedding": "q6_k"},
        {"head": "q8_0", "embedding": "q4_0"},
        {"head": "f16", "embedding": "bf16"},
    ],
)
def test_types_of_head_and_embedding(chosen: dict[str, Any], tiny: Path, build: Build, worst: Worst) -> None:
    artifact = build(tiny, "int4", target="gguf", **chosen)
    assert max(worst(artifact, tiny)) <= EXACT
    assert EXACT < max(worst(artifact, tiny, float32=False)) <= ROUNDED


def test_validate_passes_as_for_every_target(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", target="gguf", method="gptq")
    runner, exact = load_runner(artifact, 1), load_runner(artifact, 1, True)
    report = validate(artifact, runner, exact, checkpoint=tiny, options=ValidateOptions(pairs=1), progress=SILENT)
    assert report.passed, report.to_json()
    cases = {row.case: row for row in report.rows if row.comparison is Comparison.STORED}
    assert cases["512 decode steps"].figures["states"] <= EXACT
    assert "at most 1 rows" in cases["padded batch of 3"].note
    assert any(row.kind is CheckKind.LATENCY for row in report.rows)


def test_rounding_to_nearest_passes_validate(tiny: Path, build: Build) -> None:
    """µP inside fp16 scales moves a code of 127 by 0.06 steps more, and further where a scale is subnormal."""
    artifact = build(tiny, "int8", target="gguf")
    runner, exact = load_runner(artifact, 1), load_runner(artifact, 1, True)
    options = ValidateOptions(pairs=0, quick=True)
    report = validate(artifact, runner, exact, checkpoint=tiny, options=options, progress=SILENT)
    assert report.passed, report.to_json()
    (integers,) = [row for row in report.rows if row.kind is CheckKind.STORED_INTEGERS]
    assert 0.51 < integers.figures["steps"] <= 0.51 + 127 * runner.provenance.scale_rounding < 0.75


def test_only_the_last_logits(tiny: Path, build: Build) -> None:
    every, last = (build(tiny, "none", target="gguf", logits=logits) for logits in ("all", "last"))
    ids = np.arange(600, dtype=np.int64)[None]  # more than one call of llama_decode
    mask = np.ones((1, 600), np.int64)
    answers = [runner.step(ids, mask, runner.initial(1))[0] for runner in (load_runner(a, 1) for a in (every, last))]
    assert answers[1].shape[1] == 1
    np.testing.assert_allclose(answers[1], answers[0][:, -1:], atol=1e-4)


def test_a_step_leaves_states_usable(tiny: Path, build: Build) -> None:
    runner = load_runner(build(tiny, "int4", target="gguf"), 1)
    ids = np.arange(9, dtype=np.int64)[None]
    _, start = runner.step(ids, np.ones((1, 9), np.int64), runner.initial(1))
    again = [runner.step(ids[:, :1], np.ones((1, 10), np.int64), start)[0] for _ in range(2)]
    np.testing.assert_array_equal(*again)
