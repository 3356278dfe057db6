"""The table of the CUDA kernels' limits, and the graphs that it leads to; ONNX Runtime on the CPU computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import cuda_libraries
from h1export.targets.onnxruntime.emit import cuda, cuda_kernels
from h1export.targets.onnxruntime.emit.cuda_kernels import LIMITS, conv_refusal, longest_call, scan_refusal
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.variants import CPU, GRAPH_VARIANTS
from h1export.targets.sizes import ScanSizes

Build = Callable[..., Artifact]
SIZES = st.builds(
    lambda groups, per, d_head, d_state: ScanSizes(groups * per, groups, d_head, d_state=d_state),
    st.integers(1, 8),
    st.integers(1, 32),
    st.integers(1, 512),
    st.integers(1, 512),
)


@given(SIZES)
def test_a_scan_is_taken_exactly_where_its_state_has_room(sizes: ScanSizes) -> None:
    state = 4 * (sizes.d_state * sizes.d_head + 3 * sizes.d_state + max(sizes.d_head, 2))
    room = sizes.d_state in (64, 128, 256) or state <= 101376
    assert (scan_refusal(sizes) == "") == room
    smaller = replace(LIMITS, shared_memory=state - 1, register_states=())
    assert scan_refusal(sizes, smaller)


def test_heads_that_no_group_divides_are_refused() -> None:
    assert scan_refusal(ScanSizes(5, 2, 64, d_state=64))


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_a_convolution_is_taken_exactly_within_grid_and_shared_memory(channels: int, taps: int) -> None:
    fits = channels <= 65535 and 16 * (128 + 2 * taps - 1) <= 101376
    assert (conv_refusal(channels, taps) == "") == fits


@given(st.integers(1, 256))
def test_the_longest_call_fills_a_block(taps: int) -> None:
    tokens = longest_call(taps)
    assert 4 * (tokens + 2 * taps - 1) <= LIMITS.shared_memory < 4 * (tokens + 2 * taps)


def operators(artifact: Artifact) -> set[str]:
    model = onnx.load(artifact.folder / "model.onnx", load_external_data=False)
    return {node.op_type for node in model.graph.node}


def test_every_path_computes_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that refuse a kernel lead to stock operators, whose results and states are those of the kernel."""
    found = []
    for refused in ((), ("scan_refusal",), ("conv_refusal",), ("scan_refusal", "conv_refusal")):
        for name in ("scan_refusal", "conv_refusal"):
            answer = "refused" if name in refused else ""
            monkeypatch.setattr(cuda, name, lambda *_, answer=answer: answer)
        artifact = build_artifact(tiny, "ort", tmp_path / str(len(found)), options=OrtOptions(graph="cuda"))
        names = operators(artifact)
        assert ("GatedDeltaNet" in names) == ("scan_refusal" not in refused)
        assert ("CausalConvWithState" in names) == ("conv_refusal" not in refused)
        runner = load_runner(artifact, float32=True)
        ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (2, 70))
        mask = np.ones_like(ids)
        mask[1, :5] = 0
        first, states = runner.step(ids, mask, runner.initial(2))
        second, states = runner.step(ids[:, :1], np.pad(mask, ((0, 0), (0, 1)), constant_values=1), states)
        found.append((first[:, 5:], second, *runner.snapshot(states).values()))
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            assert np.abs(value - expected).max() <= 1e-5 * np.abs(expected).max()


def stand_in(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The graph in fp16, where the CPU provider stands in for CUDA's, and its memory for the device's."""
    with monkeypatch.context() as patch:
        patch.setitem(GRAPH_VARIANTS, "cuda", replace(GRAPH_VARIANTS["cuda"], provider=CPU))
        return load_runner(artifact)


def assert_in_place_is_step(runner: Any, tolerance: float) -> None:
    for batch in (1, 2):
        ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (batch, 33))
        session = runner.start(batch, 40)
        states = runner.initial(batch)
        for start, end in [(0, 20), (20, 21), (21, 22), (22, 32), (32, 33)]:
            expected, states = runner.step(ids[:, start:end], np.ones((batch, end), np.int64), states)
            assert np.abs(session.append(ids[:, start:end]) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_states_in_place_are_those_of_step(
    quant: str, tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build(tiny, quant, graph="cuda")
    assert_in_place_is_step(stand_in(artifact, monkeypatch), 1e-6)
    assert_in_place_is_step(load_runner(artifact, float32=True), 1e-5)


def test_a_call_that_no_kernel_takes_is_refused(tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = stand_in(build(tiny, "int4", graph="cuda"), monkeypatch)
    tokens = cuda_kernels.longest_call(runner.config.mamba_d_conv) + 1
    ids = np.zeros((1, tokens), np.int64)
    with pytest.raises(H1ExportError, match="pass them in several calls"):
        runner.step(ids, np.ones_like(ids), runner.initial(1))
    with pytest.raises(H1ExportError, match="pass them in several calls"):
        runner.start(1, tokens).append(ids)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("libcublasLt.so.13: cannot open shared object file: No such file", ", because libcublasLt.so.13 is missing"),
        ("undefined symbol: Provider_GetHost", ""),  # what a provider says that has all libraries
    ],
)
def test_a_missing_library_is_named(
    message: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(message)

    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / cuda_libraries.PROVIDER).touch()
    monkeypatch.setattr(sdk.onnxruntime(), "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert cuda_libraries.missing() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_states_in_place_on_the_device_are_those_of_step(quant: str, tiny: Path, build: Build) -> None:
    """Each of them may choose another attention kernel, so that they agree as far as fp16 does."""
    assert_in_place_is_step(load_runner(build(tiny, quant, graph="cuda")), 5e-3)
