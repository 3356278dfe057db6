"""num_logits_to_keep: one graph gives all logits, or those of as many last positions as a call asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_sessions import check_kept_logits

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import KEPT
from h1export.runtime.continued import ContinuedSequence
from h1export.runtime.generation import Sampling, generate
from h1export.runtime.session import open_session
from h1export.targets.onnxruntime.bound_session import BoundSession
from h1export.targets.onnxruntime.emit import kept
from h1export.targets.onnxruntime.layouts import LAYOUTS
from h1export.targets.onnxruntime.options import OrtOptions

Build = Callable[..., Artifact]
EXACT = 1e-6  # of the range: fewer rows may be added up in another order
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "native": ({}, {"kernels": "native"}),
    "stock": ({}, {"kernels": "stock"}),
    "wasm": ({"graph": "wasm"}, {}),
    "transformers.js": ({"layout": "transformers.js"}, {}),
    "portable": ({"graph": "portable"}, {}),
    "OpenVINO": ({"graph": "portable"}, {"kernels": "openvino"}),
    "OpenVINO, transformers.js": ({"graph": "portable", "layout": "transformers.js"}, {"kernels": "openvino"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_asked_for_is_the_end_of_all(name: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    options, how = RUNS[name]
    runner = load_runner(build(make_checkpoint(), "int4", **options), **how)
    assert runner.limits.all_logits

    @settings(max_examples=15, deadline=None)
    @given(batch=st.integers(1, 3), calls=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=4))
    def check(batch: int, calls: list[tuple[int, int]]) -> None:
        rng = np.random.default_rng(0)
        session = runner.start(batch, 40)
        states = runner.initial(batch)
        for tokens, keep in calls:
            ids = rng.integers(0, runner.config.vocab_size, (batch, tokens))
            whole, states = runner.step(ids, np.ones((batch, session.length + tokens), np.int64), states)
            found = session.append(ids, keep=keep)
            assert found.shape == (batch, min(keep, tokens), runner.config.vocab_size)
            assert np.abs(found - whole[:, -keep:]).max() <= EXACT * np.ptp(whole)

    check()


@pytest.mark.parametrize("keep", [None, 1, 130, 299, 300, 400])
def test_long_calls_keep_the_end(keep: int | None, tiny: Path, build: Build) -> None:
    """Where not everything is asked for, a call is divided: what is asked for may begin in an earlier part."""
    runner = load_runner(build(tiny, "int4"))
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (2, 300))
    whole, _ = runner.step(ids, np.ones_like(ids), runner.initial(2))
    found = open_session(runner, 2, 300).append(ids, keep=keep)
    assert found.shape[1] == min(keep or 300, 300)
    assert np.abs(found - whole[:, -(keep or 300) :]).max() <= 1e-5 * np.ptp(whole)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_head_computes_what_is_asked_for(layout: str, make_checkpoint: Callable[..., Path], build: Build) -> None:
    """A client with onnxruntime alone: the input may be left out, where the layout's client can see such inputs."""
    artifact = build(make_checkpoint(), layout=layout)
    path = artifact.folder / LAYOUTS[layout].graph_of(artifact)  # type: ignore[index]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert (KEPT in {port.name for port in session.get_inputs()}) == (layout != "genai")
    runner: Any = load_runner(artifact, kernels="stock")
    ids = np.arange(2, 9)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **runner.initial(1)}
    whole, _ = runner.step(ids, np.ones_like(ids), runner.initial(1))
    for keep in (0, 1, 4, 7, 8, 2**40):
        (found,) = session.run(["logits"], {**feeds, KEPT: np.array(keep, np.int64)})
        assert found.shape[1] == (min(keep, 7) or 7)
        assert np.abs(found - whole[:, -keep:]).max() <= EXACT * np.ptp(whole)
    if layout == "genai":
        assert np.array_equal(session.run(["logits"], feeds)[0], whole)


def test_an_option_that_fixes_them_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["build", str(make_checkpoint()), "--target", "ort", "--logits", "last", "--out", str(out)]
    assert run(words) == 2
    assert "--graph cpu computes the logits that a call asks for" in capsys.readouterr().err
    assert not out.exists()


def test_the_graph_for_gpus_has_the_option(make_checkpoint: Callable[..., Path], build: Build) -> None:
    """A slice by an input would be computed on the CPU, and a call with it could not be captured."""
    for logits, positions in (("all", "sequence"), ("last", 1)):
        artifact = build(make_checkpoint(), "int4", graph="cuda", logits=logits)
        assert KEPT not in artifact.manifest.inputs
        assert artifact.manifest.outputs["logits"][1][1] == positions
        runner = load_runner(artifact, float32=True)
        ids = np.arange(2, 9)[None]
        session = runner.start(1, 20)
        assert session.append(ids, keep=3).shape[1] == (3 if logits == "all" else 1)


def test_artifacts_of_earlier_builds_run(make_checkpoint: Callable[..., Path], earlier_build: Build) -> None:
    artifact = earlier_build(make_checkpoint())
    assert KEPT not in artifact.manifest.inputs
    assert OrtOptions.read(artifact).last_logits
    runner = load_runner(artifact)
    assert not runner.limits.all_logits
    assert runner.start(1, 9).append(np.arange(2, 9)[None], keep=1).shape[1] == 1
    with pytest.raises(H1ExportError, match="those of the last one only"):
        open_session(runner, 1, 9).append(np.arange(2, 9)[None], keep=2)


def test_prompts_are_computed_for_their_last_logits(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What generates, chats and completes reads one position; whoever asks for more pays for it."""
    runner = load_runner(build(make_checkpoint()))
    asked: list[int | None] = []
    append = BoundSession.append

    def noted(session: BoundSession, ids: Any, *, keep: int | None = None) -> Any:
        asked.append(keep)
        return append(session, ids, keep=keep)

    monkeypatch.setattr(BoundSession, "append", noted)
    prompt = np.arange(200) % 50
    next(generate(runner, prompt, 2, sampling=Sampling(), eos=frozenset()))
    ContinuedSequence(runner).become(prompt.tolist())
    open_session(runner, 1, 200).append(prompt[None], keep=1)
    assert asked == [1] * 6


def test_a_graph_that_keeps_the_wrong_end_is_seen(
    make_checkpoint: Callable[..., Path], build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The test of the test: without the sign, the first n positions are left out."""
    monkeypatch.setattr(kept, "_first", lambda c, given: c.build.op("Reshape", given, c.build.ints(-1)))
    runner = load_runner(build_artifact(make_checkpoint(), "ort", tmp_path / "wrong"), kernels="stock")
    with pytest.raises(AssertionError):
        check_kept_logits(runner)
