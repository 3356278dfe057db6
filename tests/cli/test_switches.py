"""A switch of `build` reaches a target that reads it, or is an error."""

from __future__ import annotations

from typing import Any

import pytest

from h1export.cli import run
from h1export.commands import pipeline
from h1export.errors import H1ExportError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--target", "coreml", "--opset-only"],
            "--opset-only: is nothing that --target coreml reads; leave it out; it is for ort",
        ),
        (["--target", "ort", "--sm", "89"], "--sm: is nothing that --target ort reads; leave it out; it is for trt"),
        (["--target", "ort", "--max-context", "2048"], "--max-context: is nothing that --target ort reads"),
        (
            ["--target", "trt", "--target", "coreml", "--provider", "cpu"],
            "--provider: is nothing that --target trt, coreml reads",
        ),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_a_switch_that_no_target_reads(
    command: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, *words]) == 2
    assert said in capsys.readouterr().err


def test_switches_that_one_of_the_targets_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request: list[Any] = []

    def build(*arguments: Any) -> None:
        request.append(arguments[4])
        raise H1ExportError("here", "the build begins", "go on")

    monkeypatch.setattr(pipeline, "build", build)
    words = [
        "--target",
        "ort",
        "--target",
        "trt",
        "--accuracy-level",
        "0",
        "--max-context",
        "96",
        "--sm",
        "89",
        "--sm",
        "90",
        "--quiet",
    ]
    assert run(["build", *words]) == 2
    assert "the build begins" in capsys.readouterr().err
    assert (request[0].accuracy_level, request[0].max_context, request[0].architectures) == (0, 96, (89, 90))
