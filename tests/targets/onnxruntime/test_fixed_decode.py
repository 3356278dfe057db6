"""Decode at fixed shapes against Runner.step; the CPU provider runs what a GPU captures. Tests marked gpu capture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_graph import copies, load

from h1export.artifact.artifact import Artifact
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import inference_session
from h1export.targets.onnxruntime.emit import cpu, cuda
from h1export.targets.onnxruntime.fixed_decode import FixedDecode
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.run_options import GRAPH_ID
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.onnxruntime.variants import CPU, CUDA, GRAPH_VARIANTS

Build = Callable[..., Artifact]
EXACT = 1e-5  # of the range, in float32
CAPACITY = 40
CALLS = [(0, 11), *((at, at + 1) for at in range(11, 30)), (30, 34), *((at, at + 1) for at in range(34, CAPACITY))]


def built(build: Build, checkpoint: Path, quant: str = "int4", **options: Any) -> Artifact:
    """Return an artifact as if it were built with --captured-decode, whose graph and weights are the same."""
    artifact = build(checkpoint, quant, graph="cuda", **options)
    switches = {**artifact.manifest.options, "captured_decode": True}
    return replace(artifact, manifest=replace(artifact.manifest, options=switches))


def deviation(runner: Any, batch: int, *, append: Callable[..., Any] | None = None, capacity: int = CAPACITY) -> float:
    """Return the largest deviation of a session's logits from Runner.step's, of the range, over prefills and decode."""
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (batch, CAPACITY))
    session = runner.start(batch, capacity)
    states = runner.initial(batch)
    worst = 0.0
    for start, end in CALLS:
        expected, states = runner.step(ids[:, start:end], np.ones((batch, end), np.int64), states)
        found = (append or type(session).append)(session, ids[:, start:end])
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the lengths at which steps of fixed shapes are taken."""
    taken: list[int] = []
    step = FixedDecode.step

    def noted(self: FixedDecode, ids: Any, length: int) -> Any:
        taken.append(length)
        return step(self, ids, length)

    monkeypatch.setattr(FixedDecode, "step", noted)
    return taken


def test_steps_of_fixed_shapes_are_step(checkpoint: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch)
    runner = load_runner(built(build, checkpoint), float32=True)
    for batch, spare in ((1, 0), (3, 9)):
        assert deviation(runner, batch, capacity=CAPACITY + spare) <= EXACT
    assert taken == 2 * [start for start, end in CALLS if end == start + 1]


def test_so_they_are_in_16_bits(tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPH_VARIANTS, "cuda", replace(GRAPH_VARIANTS["cuda"], provider=CPU))  # type: ignore[arg-type]
    assert deviation(load_runner(built(build, tiny)), 2) <= EXACT


def test_a_thread_of_its_own_captures_again(tiny: Path, build: Build) -> None:
    """A captured graph belongs to a thread; in another one, the run that captures must not advance the states."""
    runner = load_runner(built(build, tiny), float32=True)

    def append(session: Any, ids: npt.NDArray[np.int64]) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(session.append(ids)))
        thread.start()
        thread.join()
        return found[0]

    assert deviation(runner, 2, append=append) <= EXACT


def test_a_session_that_goes_back_to_saved_states(tiny: Path, build: Build) -> None:
    runner = load_runner(built(build, tiny), float32=True)
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (1, 20))
    session = runner.start(1, CAPACITY)
    session.append(ids[:, :8])
    saved = session.save()
    first = [session.append(ids[:, at : at + 1]) for at in range(8, 20)]
    session.restore(saved)
    again = [session.append(ids[:, at : at + 1]) for at in range(8, 20)]
    assert np.array_equal(np.concatenate(first), np.concatenate(again))


@pytest.mark.parametrize("fault", ["stale mask", "stale ids", "states not put back", "new token not in the mask"])
def test_planted_faults_exceed_the_tolerance(
    fault: str, tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = FixedDecode.__init__

    def faulty(self: Any, session: Any, binding: Any, carried: Any, **sizes: Any) -> None:
        make(self, session, binding, [] if fault == "states not put back" else carried, **sizes)
        if fault == "new token not in the mask":
            self._columns[:, -1] = 0
        elif fault.startswith("stale"):
            name = f"_{fault.split()[1]}"
            setattr(self, name, Stale(getattr(self, name)))

    monkeypatch.setattr(FixedDecode, "__init__", faulty)
    found = deviation(load_runner(built(build, tiny), float32=True), 1)
    print(f"{fault}: {found:.2g}")
    assert found > 2e-2  # twice what section d of tools/gpu_host allows


class Stale:
    """An OrtValue that takes the first update only."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._updates = 0

    def update_inplace(self, values: Any) -> None:
        self._updates += 1
        if self._updates == 1:
            self._value.update_inplace(values)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_nothing_goes_between_cpu_and_device(quant: str, activations: str, tiny: Path, build: Build) -> None:
    assert copies(load(built(build, tiny, quant, activations=activations))) == []


def test_so_it_is_for_every_switch(checkpoint: Path, build: Build) -> None:
    assert copies(load(built(build, checkpoint))) == []


@pytest.mark.parametrize("refused", ["scan_refusal", "conv_refusal"])
def test_so_it_is_beyond_the_kernels_limits(
    refused: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, refused, lambda *_: "refused")
    artifact = build_artifact(tiny, "ort", tmp_path / "out", options=OrtOptions(graph="cuda"))
    assert copies(load(artifact)) == []


def test_lengths_from_the_cpu_are_noticed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own mask computes seqlens_k from shapes, which a device would have to be sent."""
    monkeypatch.setattr(cuda, "fixed_length_mask", cpu._attention_mask)
    artifact = build_artifact(tiny, "ort", tmp_path / "out", options=OrtOptions(graph="cuda"))
    (found,) = copies(load(artifact))
    assert found.startswith("Expand ")


def test_sessions_capture_under_numbers_of_their_own_and_all_other_runs_under_none(
    tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load_runner(built(build, tiny), float32=True)
    numbers: list[str] = []
    session = runner._session  # type: ignore[attr-defined]

    class Noting:
        def __getattr__(self, name: str) -> Any:
            method = getattr(session, name)
            if not name.startswith("run"):
                return method
            return lambda *args: (numbers.append(args[-1].get_run_config_entry(GRAPH_ID)), method(*args))[1]

    monkeypatch.setattr(runner, "_session", Noting())
    deviation(runner, 1)
    deviation(runner, 1)
    steps = sum(end == start + 1 for start, end in CALLS)
    own = sorted(set(numbers) - {"-1"})
    assert len(own) == 2
    assert all(int(number) > 0 for number in own)
    assert [numbers.count(number) for number in own] == [steps + 1] * 2  # and the run that captures
    assert numbers.count("-1") == 2 * (len(CALLS) + len(CALLS) - steps)


def test_the_switch_changes_nothing_that_runs(tiny: Path, build: Build) -> None:
    """sbom.json names the options too."""
    plain, captured = (build(tiny, "int4", graph="cuda", captured_decode=switch) for switch in (False, True))
    files = captured.manifest.files
    assert {name for name, file in plain.manifest.files.items() if files[name] != file} <= {"sbom.json"}
    assert files.keys() == plain.manifest.files.keys()
    assert OrtOptions.read(captured) == replace(OrtOptions.read(plain), captured_decode=True)


@pytest.mark.parametrize("captured", [False, True])
def test_the_provider_is_told_to_capture(
    captured: bool, tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = built(build, tiny) if captured else build(tiny, "int4", graph="cuda")
    ort = sdk.onnxruntime()
    given: list[Any] = []

    def refuse(model: Any, options: Any, providers: Any) -> Any:
        given.extend(providers)
        raise RuntimeError("This session cannot use the graph capture feature")

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(inference_session.cuda_libraries, "preload", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(H1ExportError, match="without --captured-decode$" if captured else "again$"):
        load_runner(artifact)
    options = dict(given)
    assert (options[CUDA].get("enable_cuda_graph") == "1") == captured
    assert options[CPU] == {}


def test_only_the_cuda_graph_is_captured() -> None:
    for graph in ("cpu", "portable"):
        with pytest.raises(H1ExportError, match="--captured-decode"):
            OrtOptions(graph=graph, captured_decode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_captured_steps_are_those_without_a_graph(quant: str, tiny: Path, build: Build) -> None:
    """Both run the same kernels; the order of sums in attention may differ with the columns of the mask."""
    captured = load_runner(built(build, tiny, quant))
    assert isinstance(captured, OnnxRuntimeRunner)
    for batch in (1, 3):
        assert deviation(captured, batch) <= 5e-3
