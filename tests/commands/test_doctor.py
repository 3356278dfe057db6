"""`h1export doctor` on an artifact for ONNX Runtime, and what its document leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from h1export import cli
from h1export.artifact.artifact import REPORT, Artifact
from h1export.commands.doctor import _cell, _private, _scrub, examine
from h1export.errors import H1ExportError

pytestmark = pytest.mark.ort


def test_an_artifact_that_fits(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint()
    artifact = build(checkpoint, "int4")
    had_report = (artifact.folder / REPORT).exists()
    assert cli.run(["doctor", str(artifact.folder), str(checkpoint), "--json"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    assert document["fits"] is True
    assert (artifact.folder / REPORT).exists() is had_report
    assert [f["name"] for f in document["findings"]][-1] == "validate --quick"
    assert all(f["passed"] is not False for f in document["findings"])
    cases = {row["case"] for row in document["results"] if row.get("case")}
    assert cases == {"one token", "ragged chunks", "int4"}  # the last one says what integers cost
    assert document["artifact"]["manifest"] == artifact.manifest.key
    assert str(artifact.folder) not in text
    assert str(Path.home()) not in text


def test_an_execution_provider_that_is_not_here(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["AnotherProvider"])
    document = examine(build(checkpoint, "int4").folder, checkpoint)
    (wrong,) = [finding for finding in document["findings"] if finding["passed"] is False]
    assert wrong["detail"] == "CPUExecutionProvider: this onnxruntime does not have it, only AnotherProvider"
    assert (document["fits"], document["results"]) == (False, [])


def test_kernels_that_do_not_compile_are_no_failure(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise H1ExportError("native kernels", "no C++ compiler found", "install one")

    checkpoint = make_checkpoint()
    monkeypatch.setattr("h1export.targets.onnxruntime.native_library.library", fails)
    document = examine(build(checkpoint, "int4").folder, checkpoint)
    kernels = next(finding for finding in document["findings"] if finding["name"] == "h1export's kernels")
    assert (kernels["passed"], kernels["next_step"]) == (None, "install one")
    assert document["fits"] is True


def test_a_runtime_that_raises_is_a_finding(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of device memory\nat /srv/x/y.cc")

    checkpoint = make_checkpoint()
    folder = build(checkpoint, "int4").folder
    monkeypatch.setattr("h1export.commands.doctor.validate_artifact", fails)
    document = examine(folder, checkpoint)
    assert document["findings"][-1]["detail"] == "RuntimeError: out of device memory"
    assert document["fits"] is False


def test_the_page_does_not_replace_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", str(tmp_path), "--out", str(tmp_path / "doctor.md")]) == 2
    assert "name a .json file" in capsys.readouterr().err


def test_another_checkpoint_is_said_and_not_judged(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], tiny: Path
) -> None:
    document = examine(build(make_checkpoint(), "int4").folder, tiny)
    assert document["findings"][-1]["passed"] is None
    assert "was not built from" in document["findings"][-1]["detail"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/srv/models/x: broken", "x: broken"),
        ("cannot open '/srv/a/lib.so.1'", "cannot open 'lib.so.1'"),
        (r"D:\models\model.onnx is missing", "model.onnx is missing"),
        ("12 tokens/s and 1/2", "12 tokens/s and 1/2"),
        ("an artifact at /data/my out/model.engine", "an artifact at OUT/model.engine"),
        ("the user jane on jane-pc", "the user USER on HOST"),
    ],
)
def test_paths_and_names_are_left_out(text: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "jane")
    monkeypatch.setattr("platform.node", lambda: "jane-pc")
    private = _private(Path("/data/my out"), Path("/data/model"))
    assert _scrub({"key": [text]}, private) == {"key": [kept]}


def test_markup_of_a_file_stays_text() -> None:
    assert _cell("a | b\n<script>") == "a \\| b &lt;script>"
