"""Sessions, saved states and clients over llama.cpp, and the check of its structures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved_sessions import CHECKS, check_chat, check_save_and_restore

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import SILENT
from h1export.quantize.scheme import QuantScheme
from h1export.runtime.generation import Sampling, generate
from h1export.runtime.runner import Runner
from h1export.targets import get_target
from h1export.targets.base import Finding
from h1export.targets.gguf import llama, sdk, state_bytes
from h1export.targets.gguf.runner import LlamaRunner
from h1export.targets.gguf.writer import MODEL
from h1export.validate.accuracy.weights import weight_errors

Build = Callable[..., Artifact]


@pytest.fixture
def runner(make_checkpoint: Callable[..., Path], build: Build) -> Runner[Any]:
    return load_runner(build(make_checkpoint("norm_after_gate_two_groups"), target="gguf"), 1)


def test_save_and_restore(runner: Runner[Any]) -> None:
    check_save_and_restore(runner, 1)


@pytest.mark.parametrize("check", list(CHECKS))
def test_sessions(check: str, runner: Runner[Any]) -> None:
    CHECKS[check](runner)


def test_chat(spoken_checkpoint: Path, build: Build, tmp_path: Path) -> None:
    check_chat(build(spoken_checkpoint, target="gguf"), tmp_path / "out")


def test_states_are_llama_cpps_bytes(runner: Any) -> None:
    ids = np.arange(11, dtype=np.int64)[None]
    _, states = runner.step(ids, np.ones((1, 11), np.int64), runner.initial(1))
    found = runner.snapshot(states)
    again = state_bytes.write(found, runner.config, 11, sequence=llama.SEQUENCE)
    np.testing.assert_array_equal(again, states.data)


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5])
def test_states_of_another_layout_are_an_error(place: int, runner: Any) -> None:
    ids = np.arange(3, dtype=np.int64)[None]
    _, states = runner.step(ids, np.ones((1, 3), np.int64), runner.initial(1))
    states.data[4 * place] ^= 5
    with pytest.raises(H1ExportError, match="saves states in another form"):
        runner.snapshot(states)
    with pytest.raises(state_bytes.StateFormatError):
        state_bytes.read(states.data[:-9], runner.config, 3, sequence=llama.SEQUENCE)


def test_the_context_grows_with_the_text(runner: Any) -> None:
    """Steps beyond the first context give what a session that was opened for all of them gives."""
    ids = np.random.default_rng(0).integers(0, 259, (1, 1300))
    states = runner.initial(1)
    ends = (500, 501, 1100, 1300)
    for start, end in zip((0, *ends), ends, strict=False):
        found, states = runner.step(ids[:, start:end], np.ones((1, end), np.int64), states)
    session = runner.start(1, 1300)
    for start, end in zip((0, *ends), ends, strict=False):
        expected = session.append(ids[:, start:end])
    np.testing.assert_array_equal(found, expected)


def test_refused_calls(runner: Any) -> None:
    with pytest.raises(H1ExportError, match="one sequence at a time"):
        runner.initial(2)
    mask = np.array([[0, 1]])
    with pytest.raises(H1ExportError, match="1 pads"):
        runner.step(np.array([[1, 2]]), mask, runner.initial(1))
    session = runner.start(1, 4)
    with pytest.raises(H1ExportError, match="room for one of 4"):
        session.append(np.zeros((1, 5), np.int64))


def test_the_tokens_are_those_of_onnx_runtime(tiny: Path, build: Build) -> None:
    prompt = np.array([7, 500, 1200, 33])
    texts = []
    for target in ("gguf", "ort"):
        runner = load_runner(build(tiny, "none", target=target), 1)
        texts.append(list(generate(runner, prompt, 10, sampling=Sampling(), eos=frozenset())))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 2


def test_a_prequantized_checkpoint_keeps_its_codes(
    make_gptq: Callable[..., Any], build: Build, tmp_path: Path, worst: Any
) -> None:
    written = make_gptq(tmp_path / "gptq")
    artifact = build(written.folder, target="gguf")
    assert max(worst(artifact, written.folder)) <= 1e-5
    runner = load_runner(artifact, 1)
    stored: Any = runner.stored_weights()
    store = WeightStore.open(written.folder, FalconH1Config.load(written.folder))
    rounding = runner.provenance.scale_rounding
    assert 0 < rounding <= 2.0**-11
    errors = weight_errors(stored, artifact.manifest.weights, store, rounding=rounding)
    assert {errors[name]["steps"] for name in written.codes} == {0.0}
    for name, codes in written.codes.items():
        np.testing.assert_array_equal(stored.quantized(name).codes, codes - 8, err_msg=name)


def test_doctor(tiny: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, Finding]:
        artifact = build(tiny, "int4", target="gguf")
        return {f.name: f for f in get_target("gguf").examine(artifact, build=False, progress=SILENT)}

    assert {name: finding.passed for name, finding in found().items()} == {"llama.cpp": True, "loading": True}
    llama.api.cache_clear()
    monkeypatch.setattr(sdk, "version", lambda: "2030.1")
    assert found()["llama.cpp"].passed is False
    assert found()["llama.cpp"].next_step == f"pip install xllamacpp=={sdk.XLLAMACPP}"
    llama.api.cache_clear()


@pytest.mark.parametrize("kind", [llama.ModelParams, llama.ContextParams])
def test_a_structure_with_one_field_more_is_an_error(kind: Any) -> None:
    """Every place where a release could have added a field is seen by the defaults that have moved."""
    api = llama.api()
    call = {llama.ModelParams: api.llama_model_default_params, llama.ContextParams: api.llama_context_default_params}
    right = bytes(call[kind]())
    last = kind.guard.offset
    for name in llama.DEFAULTS[kind]:
        field = getattr(kind, name)
        if field.size < 4 or field.offset + 8 > last:
            continue
        moved = right[: field.offset] + b"\xa5" * 8 + right[field.offset : -8]
        with pytest.raises(H1ExportError, match="another layout"):
            llama._check(kind.from_buffer_copy(moved), Path("xllamacpp.so"))


@pytest.mark.parametrize("damage", ["magic", "cut"])
def test_a_damaged_file_is_an_error(damage: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    artifact = build_artifact(make_checkpoint(), "gguf", tmp_path / "out", scheme=QuantScheme("int8"))
    path = artifact.folder / MODEL
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"x" + data[1:])
    with pytest.raises(H1ExportError, match=MODEL):
        LlamaRunner(artifact, 1, False)
    with pytest.raises(H1ExportError, match="no kernels"):
        load_runner(artifact, kernels="native")
