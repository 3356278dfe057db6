"""`h1export coreml` on a package that h1export built."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_files import ODD, bounded

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


def npy(descr: str, shape: str, body: bytes = b"") -> bytes:
    """Return a .npy file; numpy reads its header as an expression of Python."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (53 - len(header) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


MEMBERS: dict[str, tuple[str, bytes]] = {
    "2^62 elements": ("ids.npy", npy("'<i8'", f"({1 << 62},)")),
    "terabytes": ("ids.npy", npy("'<i8'", "(300000000000,)")),
    "below zero": ("ids.npy", npy("'<i8'", "(-5,)")),
    "objects": ("ids.npy", npy("'|O'", "(1,)", bytes(8))),
    "code": ("ids.npy", npy("__import__('os').system('exit 1')", "(1,)", bytes(8))),
    "depth": ("ids.npy", npy("(" * 900 + ")" * 900, "(1,)")),
    "cut": ("ids.npy", npy("'<i8'", "(9,)", bytes(8))),
    "another version": ("ids.npy", b"\x93NUMPY\x09\x09"),
    "bytes": ("ids", b"hello"),
    "name": ("\x1b[31m" + "n" * 9999 + ".npy", npy("'<i8'", "(1,)", bytes(8))),
    "unpacked": ("ids.npy", npy("'<i1'", "(150000000,)", bytes(150_000_000))),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_hostile_inputs(case: str, built: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content = MEMBERS[case]
    file = tmp_path / "in.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as members:
        members.writestr(name, content)
    assert run(["coreml", "run", str(built.folder), "--inputs", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    assert len(said) <= len("h1export: \n") + 300 + len(str(tmp_path / "in.npz"))


@pytest.mark.parametrize("odd", ODD)
def test_inputs_that_are_no_file(odd: str, built: Artifact, tmp_path: Path) -> None:
    ODD[odd](tmp_path / "in.npz")
    with bounded(seconds=10):
        assert run(["coreml", "run", str(built.folder), "--inputs", str(tmp_path / "in.npz")]) == 2
