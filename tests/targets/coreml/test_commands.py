"""`h1export coreml` on a package that h1export built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.commands.load import load_runner
from h1export.targets.coreml.program import layout

Build = Callable[..., Artifact]


@pytest.fixture
def built(tiny: Path, build: Build) -> Artifact:
    return build(tiny, "int4", target="coreml", max_context=192)


def test_inspect(built: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["coreml", "inspect", str(built.folder / layout.PACKAGE), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["prefill"]["inputs"] == {"input_ids": "int32[1, 64]", "position": "int32[1]", "n_valid": "int32[1]"}
    assert found["decode"]["operations"]["scaled_dot_product_attention"] == built.config.num_hidden_layers
    assert run(["coreml", "inspect", str(built.folder)]) == 0
    assert "function decode" in capfd.readouterr().err


def test_lint(built: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["coreml", "lint", str(built.folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == []


def test_runs_in_turn_are_the_runners(built: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runner = load_runner(built)
    states = None
    state = runner.initial(1)
    after = str(tmp_path / "after.npz")
    for position, token in enumerate((5, 9)):
        logits, state = runner.step(np.array([[token]]), np.ones((1, position + 1), np.int64), state)
        given = {"input_ids": np.array([[token]], np.int32), "position": np.array([position], np.int32)}
        np.savez(tmp_path / "in.npz", **given)  # type: ignore[arg-type]
        command = [
            "coreml",
            "run",
            str(built.folder),
            "--function",
            "decode",
            "--inputs",
            str(tmp_path / "in.npz"),
            "--out",
            after,
            "--json",
        ]
        assert run([*command, *(["--states", states] if states else [])]) == 0
        states = after
        with np.load(after) as arrays:
            np.testing.assert_array_equal(arrays["logits"].astype(np.float32), logits)
    assert 0 < json.loads(capfd.readouterr().out.split("\n}\n")[1] + "\n}")["maxima"]["linear"] < 65504


def test_bad_input_is_exit_code_2(built: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.npz").write_bytes(b"nothing")
    assert run(["coreml", "run", str(built.folder), "--inputs", str(tmp_path / "in.npz")]) == 2
    assert "write it with numpy.savez" in capfd.readouterr().err
    assert run(["coreml", "lint", str(tmp_path)]) == 2
    assert "give the folder of an .mlpackage" in capfd.readouterr().err
    np.savez(tmp_path / "in.npz", position=np.array([0], np.int32))
    assert run(["coreml", "run", str(built.folder), "--inputs", str(tmp_path / "in.npz")]) == 2
    assert "is missing" in capfd.readouterr().err
