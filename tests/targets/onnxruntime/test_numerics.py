"""The exported graph against transformers: every config switch, every precision, every case of the harness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program_runner import ProgramRunner

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.load import load_runner
from h1export.graphs.passes import run_passes
from h1export.graphs.trace import trace
from h1export.progress import SILENT
from h1export.report.report import Row
from h1export.targets import Kernels
from h1export.validate.accuracy import tolerances
from h1export.validate.accuracy.run import ValidateOptions, validate

EXACT = 1e-5  # of the range; float32 leaves 1e-6 on these depths
NO_LATENCY = ValidateOptions(pairs=0)

Build = Callable[..., Artifact]


both_kernels = pytest.mark.parametrize("kernels", ["stock", "native"])
# CI compares the two graphs instead, in test_both_graphs_read_rounded_keys_and_values_however_the_prompt_is_cut
both_kernels_slowly = pytest.mark.parametrize("kernels", [pytest.param("stock", marks=pytest.mark.slow), "native"])


def compared(artifact: Artifact, checkpoint: Path, kernels: Kernels = "auto") -> dict[str, list[Row]]:
    """The rows of a validation that compare outputs, by what they compare."""
    shipped, exact = (load_runner(artifact, float32=float32, kernels=kernels) for float32 in (False, True))
    report = validate(artifact, shipped, exact, checkpoint=checkpoint, options=NO_LATENCY, progress=SILENT)
    assert report.passed, report.to_json()
    found = defaultdict(list)
    for row in report.rows:
        if row.compares_outputs:
            found[row.comparison].append(row)
    return found


def rows(artifact: Artifact, checkpoint: Path, against: str, kernels: Kernels = "auto") -> list[Row]:
    return compared(artifact, checkpoint, kernels)[against]


def assert_exact(found: list[Row], limit: float) -> None:
    assert len(found) == 8
    for row in found:
        assert row.figures["logits"] <= limit, row
        assert row.figures["states"] <= limit, row


@both_kernels
def test_float32_is_exact_for_every_switch(kernels: Kernels, checkpoint: Path, build: Build) -> None:
    assert_exact(rows(build(checkpoint), checkpoint, "source", kernels), EXACT)


@both_kernels
@pytest.mark.parametrize("name", ["plain", "tied", "odd_sizes", "everything"])
def test_int4_is_exact_against_its_own_weights(
    name: str, kernels: Kernels, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    """For the switches that products see; the graph differs from that in float32 in its products alone."""
    checkpoint = make_checkpoint(name)
    assert_exact(rows(build(checkpoint, "int4"), checkpoint, "stored", kernels), EXACT)


@both_kernels
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_int8_is_exact_against_its_own_weights(
    name: str, kernels: Kernels, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    checkpoint = make_checkpoint(name)
    assert_exact(rows(build(checkpoint, "int8"), checkpoint, "stored", kernels), EXACT)


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_int8_takes_widths_that_no_block_divides(name: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    checkpoint = make_checkpoint(name, hidden_size=100, num_attention_heads=2, intermediate_size=90)
    assert_exact(rows(build(checkpoint, "int8"), checkpoint, "stored"), EXACT)


@pytest.mark.parametrize("quant", ["none", pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_the_embedded_model_is_exact(quant: str, tiny: Path, build: Build) -> None:
    found = rows(build(tiny, quant), tiny, "source" if quant == "none" else "stored")
    assert_exact(found, EXACT)


@pytest.mark.parametrize("group_size", [pytest.param(64, marks=pytest.mark.slow), 128])
def test_larger_groups_are_exact(group_size: int, tiny: Path, build: Build) -> None:
    assert_exact(rows(build(tiny, "int4", group_size=group_size), tiny, "stored"), EXACT)


@both_kernels
def test_accuracy_level_4_drifts_and_says_how_far(kernels: Kernels, tiny: Path, build: Build) -> None:
    found = compared(build(tiny, "int4", accuracy_level=4), tiny, kernels)
    assert_exact(found["stored"], EXACT)  # the same file in float32 arithmetic
    drift = max(row.figures["logits"] for row in found["drift"])
    print(f"accuracy level 4: logits drift by {drift:.2e} of their range")
    assert 1e-4 < drift < 0.08  # int8 activations cannot be exact; the upper end is the default gate


@both_kernels_slowly
def test_keys_and_values_in_16_bits_drift_and_are_exact_in_float32(kernels: Kernels, tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", kv="fp16")
    assert artifact.manifest.inputs["past_key_values.0.key"][0] == "FLOAT16"
    assert artifact.manifest.outputs["present.0.value"][0] == "FLOAT16"
    assert artifact.manifest.inputs["past_key_values.0.recurrent_state"][0] == "FLOAT"
    found = compared(artifact, tiny, kernels)
    assert_exact(found["stored"], EXACT)  # the same file in float32 arithmetic
    drift = found["drift"]
    logits = max(row.figures["logits"] for row in drift)
    print(f"keys and values in fp16: logits drift by {logits:.2e} of their range")
    assert 1e-5 < logits < 1e-3  # a key has 11 bits
    assert all(row.figures["states"] < 2e-3 for row in drift)


@both_kernels_slowly
def test_keys_and_values_in_int8_drift_and_are_exact_in_float32(kernels: Kernels, tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4", kv="int8")
    dim = artifact.config.head_dim
    assert artifact.manifest.inputs["past_key_values.0.key"] == ("INT8", ("batch", 2, "past", dim + dim // 16))
    assert artifact.manifest.outputs["present.0.value"][0] == "INT8"
    assert artifact.manifest.inputs["past_key_values.0.recurrent_state"][0] == "FLOAT"
    found = compared(artifact, tiny, kernels)
    assert_exact(found["stored"], EXACT)  # the same file in float32 arithmetic
    drift = found["drift"]
    figures = {name: max(row.figures[name] for row in drift) for name in ("logits", "states", "kl")}
    print(f"keys and values in int8: drift {figures}")
    assert 1e-3 < figures["logits"] < 5e-3 < tolerances.CODES["logits"] / 5
    assert figures["states"] < 8e-3
    assert figures["kl"] < 5e-5


def test_the_default_is_16_bits_beside_integers_and_float32_beside_floats(tiny: Path, build: Build) -> None:
    for quant, expected in (("int4", "FLOAT16"), ("none", "FLOAT")):
        inputs = build(tiny, quant, kv="auto").manifest.inputs
        assert inputs["past_key_values.3.value"][0] == expected
    for other in ({"graph": "portable"}, {"graph": "wasm"}, {"layout": "transformers.js"}):
        inputs = build(tiny, "int4", kv="auto", **other).manifest.inputs
        assert inputs["past_key_values.3.value"][0] == "FLOAT"


@pytest.mark.parametrize(("kv", "cut", "other"), [("fp16", 5e-5, 2e-4), ("int8", 5e-3, 5e-3)])
def test_both_graphs_read_rounded_keys_and_values_however_the_prompt_is_cut(
    kv: str, cut: float, other: float, tiny: Path, build: Build
) -> None:
    """What a call has computed itself is read as a later call will read it."""
    artifact = build(tiny, "int4", kv=kv)
    ids = np.random.default_rng(1).integers(0, 4096, (1, 70))
    found = []
    for kernels in ("native", "stock"):
        runner: Any = load_runner(artifact, kernels=kernels)
        for cuts in ((70,), (1, 40, 41, 70)):
            states = runner.initial(1)
            start = 0
            for end in cuts:
                logits, states = runner.step(ids[:, start:end], np.ones((1, end), np.int64), states)
                start = end
            found.append(logits[:, -1])
    ours, ours_cut, stock, stock_cut = found
    assert np.abs(ours_cut - ours).max() <= cut * np.ptp(ours)  # a key that is rounded to its other neighbour is rare
    assert np.abs(stock_cut - stock).max() <= cut * np.ptp(ours)
    assert np.abs(stock - ours).max() <= other * np.ptp(ours)  # in fp16 queries and results are rounded there too


def test_last_logits_of_earlier_builds_are_the_last_of_all(tiny: Path, build: Build, earlier_build: Build) -> None:
    last = earlier_build(tiny)
    full = build(tiny)
    ids = np.arange(2, 9)[None]
    mask = np.ones((1, 7), np.int64)
    answers = []
    for artifact in (last, full):
        runner: Any = load_runner(artifact)
        answers.append(runner.step(ids, mask, runner.initial(1))[0])
    assert answers[0].shape == (1, 1, 4096)
    np.testing.assert_allclose(answers[0], answers[1][:, -1:], rtol=0, atol=1e-5)
    assert_exact(rows(last, tiny, "source"), EXACT)


def test_rotary_angles_at_long_positions(make_checkpoint: Callable[..., Path], build: Build) -> None:
    """Past of 60,000 tokens: float32 angles of 6e4 radians must agree with PyTorch's."""
    # rope_theta 1e4: the angles that turn fastest
    checkpoint = make_checkpoint("no_mup")
    past = 60_000
    artifact = build(checkpoint)
    rng = np.random.default_rng(0)
    runners = [load_runner(artifact)]
    program = run_passes(trace(artifact.config))
    judge: Any = ProgramRunner(program, WeightStore.open(checkpoint, artifact.config))
    states = judge.initial(1)
    grown = {}
    for name, state in states.items():
        shape = (*state.shape[:2], past, state.shape[3]) if name.endswith((".key", ".value")) else tuple(state.shape)
        grown[name] = rng.standard_normal(shape).astype(np.float32) * 0.3
    ids = rng.integers(0, 259, (1, 3))
    mask = np.ones((1, past + 3), np.int64)
    import torch

    truth, after = judge.step(ids, mask, {name: torch.from_numpy(state) for name, state in grown.items()})
    permuted = {name: _native(name, state) for name, state in grown.items()}
    logits, native = runners[0].step(ids, mask, permuted)
    assert np.abs(logits - truth).max() <= EXACT * np.ptp(truth)
    found = runners[0].snapshot(native)
    expected = judge.snapshot(after)
    for key in ("0.key", "1.key"):
        assert np.abs(found[key][:, :, past:] - expected[key][:, :, past:]).max() <= EXACT * np.ptp(expected[key])


def _native(name: str, state: Any) -> Any:
    from h1export.model.falcon_h1.states import StateKind
    from h1export.targets.onnxruntime import state_layout

    return state_layout.permute(StateKind(name.rsplit(".", 1)[1]), state)
